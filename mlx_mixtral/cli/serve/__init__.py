"""``mlx-mixtral serve``."""
