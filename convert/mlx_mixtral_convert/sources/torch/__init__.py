"""Files of PyTorch, read without it."""
