"""What a conversion writes: its files, planned, written and journalled."""
