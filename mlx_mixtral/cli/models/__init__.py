"""Models in the hub's cache: listed, fetched, removed."""
