"""Who runs the steps of a run, one kind a file: this project's own engine, and others over data ranks."""
