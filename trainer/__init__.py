"""The run: config, data, loop, checkpoints, evaluation."""
