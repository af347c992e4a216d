"""Sequence mixers: how information moves along the sequence."""
