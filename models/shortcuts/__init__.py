"""Learned extras on the identity path."""
