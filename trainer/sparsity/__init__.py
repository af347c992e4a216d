"""Sparse training: what of the weights the forward and backward passes see."""
