"""PyTorch: `torch.nn`, `torch.optim.SGD`, `torch.compile`."""
