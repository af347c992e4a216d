"""Which layers run for which token."""
