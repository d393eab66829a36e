"""A batch norm's scale before a pointwise convolution and another batch norm: its gradient cancels."""

from flax import nnx
from torch import nn

from lockstep import Pair
from lockstep.backends.flax_backend.layers import BatchNorm


class Original(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in (8, 32, 32, 8, 32, 32, 8)])
        self.wide = nn.ModuleList([nn.Conv2d(8, 32, 1, bias=False) for _ in range(2)])
        self.depth = nn.ModuleList(
            [nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False) for _ in range(2)]
        )
        self.narrow = nn.ModuleList([nn.Conv2d(32, 8, 1, bias=False) for _ in range(2)])
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = nn.functional.relu6(self.norms[0](self.first(x)))
        for i in range(2):
            y = nn.functional.relu6(self.norms[3 * i + 1](self.wide[i](x)))
            y = nn.functional.relu6(self.norms[3 * i + 2](self.depth[i](y)))
            x = x + self.norms[3 * i + 3](self.narrow[i](y))
        return self.head(x.mean((2, 3)))


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        def conv(i, o, k, stride=1, groups=1):
            return nnx.Conv(
                i,
                o,
                (k, k),
                stride,
                padding=k // 2,
                feature_group_count=groups,
                use_bias=False,
                rngs=rngs,
            )

        self.first = conv(3, 8, 3, 2)
        widths = (8, 32, 32, 8, 32, 32, 8)
        self.norms = nnx.List(
            [BatchNorm(width, momentum=0.9, epsilon=1e-5, rngs=rngs) for width in widths]
        )
        self.wide = nnx.List([conv(8, 32, 1) for _ in range(2)])
        self.depth = nnx.List([conv(32, 32, 3, groups=32) for _ in range(2)])
        self.narrow = nnx.List([conv(32, 8, 1) for _ in range(2)])
        self.head = nnx.Linear(8, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu6(self.norms[0](self.first(x)))
        for i in range(2):
            y = nnx.relu6(self.norms[3 * i + 1](self.wide[i](x)))
            y = nnx.relu6(self.norms[3 * i + 2](self.depth[i](y)))
            x = x + self.norms[3 * i + 3](self.narrow[i](y))
        return self.head(x.mean((1, 2)))


PAIR = Pair(torch=Original, flax=Port)
