"""One module for each family of paths."""
