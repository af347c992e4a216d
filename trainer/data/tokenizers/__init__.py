"""A file for every kind of tokenizer."""
