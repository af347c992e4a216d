"""A file for every format of text files."""
