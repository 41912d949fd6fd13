"""The toy laboratory: a small world, records and benchmarks about it, and a model that has read of it."""
