"""The command `routing`."""
