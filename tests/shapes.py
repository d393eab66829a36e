"""The parameters of the tutorial's network, for ten classes, in the canonical layout."""

NET = {
    "conv1.kernel": (5, 5, 3, 6),
    "conv1.bias": (6,),
    "conv2.kernel": (5, 5, 6, 16),
    "conv2.bias": (16,),
    "fc1.kernel": (400, 120),
    "fc1.bias": (120,),
    "fc2.kernel": (120, 84),
    "fc2.bias": (84,),
    "fc3.kernel": (84, 10),
    "fc3.bias": (10,),
}
