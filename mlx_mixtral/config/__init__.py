"""A checkpoint's configuration: what ``config.json`` says, and which tensors follow from it."""
