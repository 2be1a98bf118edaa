"""Where the bytes of a source come from."""
