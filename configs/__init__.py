"""YAML run files, and the machinery that loads, merges and validates them; no schema of a plug-in lives here."""
