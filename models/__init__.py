"""What is computed: single-process code without process groups, devices or I/O."""
