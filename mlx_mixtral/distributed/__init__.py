"""One model on several machines: what each of them holds."""
