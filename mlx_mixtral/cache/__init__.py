"""Keys and values of the tokens seen so far."""
