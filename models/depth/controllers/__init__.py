"""What skip-middle's gates cost."""
