"""Where expert weights live in memory and how tokens are gathered to them."""
