"""The training loop in sixty plain lines of PyTorch and of JAX, to be read next to each other."""
