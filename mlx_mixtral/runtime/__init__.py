"""What applications use: a loaded model, its text, its streams."""
