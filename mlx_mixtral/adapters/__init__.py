"""Adapters: low-rank changes of a model's matrices, as mlx-lm and PEFT write them."""
