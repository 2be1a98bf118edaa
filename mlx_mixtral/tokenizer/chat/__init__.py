"""Chat formats: from messages to token ids."""
