"""Where it is computed: meshes, and every parallelism, applied to a model from outside."""
