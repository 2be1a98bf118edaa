"""Tools: definitions and choices in, prompts and grammars out, and calls read from what a model writes.

Nothing here knows of a model or of HTTP: texts and token ids only.
"""
