"""A memory budget: what it has to hold, and which experts stay in memory under it."""
