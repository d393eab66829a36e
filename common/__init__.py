"""Shared by both backends, and free of any framework: data, weights, the training loop, the
comparison, the report."""
