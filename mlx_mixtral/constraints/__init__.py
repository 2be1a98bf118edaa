"""Text that keeps a form: JSON schemas, regular expressions and grammars as masks over the vocabulary."""
