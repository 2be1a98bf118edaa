"""Speculation: several tokens proposed cheaply and verified in one forward, with the distribution of the text unchanged."""
