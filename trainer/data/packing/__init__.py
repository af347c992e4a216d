"""Packings: how documents become sequences of one length."""
