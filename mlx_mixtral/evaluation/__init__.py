"""What a checkpoint is worth: perplexity, distance to a reference, long context."""
