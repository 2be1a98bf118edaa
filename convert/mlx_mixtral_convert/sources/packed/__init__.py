"""Hugging Face folders whose matrices are packed: AWQ, GPTQ, FP8."""
