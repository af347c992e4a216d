"""Residual topologies: what is kept between sublayers, and how sublayers read and write it."""
