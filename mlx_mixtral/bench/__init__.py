"""How fast a model is here: prefill, decode by depth of context, batches, load; against what memory allows, and mlx-lm."""
