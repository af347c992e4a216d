"""Where attention is gated."""
