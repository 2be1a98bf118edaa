"""lm-evaluation-harness on a loaded model (https://github.com/EleutherAI/lm-evaluation-harness); needs the extra ``eval``.

Requests are answered in ``responder``; ``lm`` wraps that up as one of its models, and
``tasks`` runs tasks.
"""
