"""What both backends share, free of any framework: data, weights, the training loop, the
comparison, the report."""
