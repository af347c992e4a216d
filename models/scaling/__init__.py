"""The size of a branch."""
