"""Layer norm and dense layers over 1,024 tokens, whose gradients the libraries sum coarsely in bfloat16."""

from flax import nnx
from torch import nn

from lockstep import Pair


class Original(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, classes)

    def forward(self, x):
        x = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        return self.fc2(nn.functional.gelu(self.fc1(x)).mean(1))


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.conv = nnx.Conv(3, 16, (3, 3), padding=1, rngs=rngs)
        self.norm = nnx.LayerNorm(16, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.fc1 = nnx.Linear(16, 32, rngs=rngs)
        self.fc2 = nnx.Linear(32, classes, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.conv(x).reshape(len(x), -1, 16))
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False).mean(1))


PAIR = Pair(torch=Original, flax=Port)
