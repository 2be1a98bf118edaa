"""The machine: what it is, how much memory it has, how fast it reads."""
