"""lm-evaluation-harness on a loaded model (https://github.com/EleutherAI/lm-evaluation-harness); needs the extra ``eval``.

What its backends are asked for is in ``backend``; ``lm`` wraps that up as one of its models, and
``tasks`` runs tasks.
"""
