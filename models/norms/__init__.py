"""Where a branch is normalised."""
