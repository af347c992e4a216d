"""Optimisers: what a step makes of the gradients."""
