"""The libraries' own attention: one packed matrix there, four kernels with an axis of heads here."""

from flax import nnx
from torch import nn

from lockstep import Pair


class Original(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.patches = nnx.Conv(3, 32, (8, 8), 8, padding="VALID", rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.head = nnx.Linear(32, classes, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(len(x), 16, 32)
        return self.head((x + self.attention(x)).mean(1))


PAIR = Pair(torch=Original, flax=Port)
