"""Channel mixers: how information moves across channels."""
