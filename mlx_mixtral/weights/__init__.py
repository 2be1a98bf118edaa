"""Reading checkpoints: safetensors headers and byte ranges, the index, and dtype conversions."""
