"""Routers: one file each."""
