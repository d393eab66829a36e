"""Inverted residuals as in MobileNet-v2: expand, convolve by channel, project."""

from flax import nnx
from torch import nn

from lockstep import Pair
from lockstep.backends.flax_backend.layers import BatchNorm

PLAN = ((1, 8, 1), (4, 12, 2), (4, 12, 1), (4, 16, 2))  # expansion, width, stride


class Inverted(nn.Module):
    def __init__(self, inputs, width, stride, expansion):
        super().__init__()
        hidden, self.same = inputs * expansion, stride == 1 and inputs == width
        layers = []
        if expansion > 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, width, 1, bias=False),
            nn.BatchNorm2d(width),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv(x) if self.same else self.conv(x)


class MobileNet(nn.Module):
    def __init__(self, classes):
        super().__init__()
        features = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
        width = 8
        for expansion, out, stride in PLAN:
            features.append(Inverted(width, out, stride, expansion))
            width = out
        self.features = nn.Sequential(*features)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean([2, 3]))


def convolve(inputs, width, kernel, rngs, stride=1, groups=1):
    return [
        nnx.Conv(
            inputs,
            width,
            (kernel, kernel),
            strides=stride,
            padding=kernel // 2,
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        ),
        BatchNorm(width, momentum=0.9, epsilon=1e-5, rngs=rngs),
    ]


class FlaxInverted(nnx.Module):
    def __init__(self, inputs, width, stride, expansion, rngs):
        hidden, self.same = inputs * expansion, stride == 1 and inputs == width
        layers = [*convolve(inputs, hidden, 1, rngs), nnx.relu6] if expansion > 1 else []
        layers += [*convolve(hidden, hidden, 3, rngs, stride, groups=hidden), nnx.relu6]
        self.body = nnx.Sequential(*layers, *convolve(hidden, width, 1, rngs))

    def __call__(self, x):
        return x + self.body(x) if self.same else self.body(x)


class FlaxMobileNet(nnx.Module):
    def __init__(self, classes, rngs):
        self.stem = nnx.Sequential(*convolve(3, 8, 3, rngs, 2), nnx.relu6)
        blocks, width = [], 8
        for expansion, out, stride in PLAN:
            blocks.append(FlaxInverted(width, out, stride, expansion, rngs))
            width = out
        self.blocks = nnx.List(blocks)
        self.classifier = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean((1, 2)))


PAIR = Pair(
    MobileNet,
    FlaxMobileNet,
    names={
        "features.0": "stem.layers.0",
        "features.1": "stem.layers.1",
        "features.3.conv": "blocks.0.body",
        "features.4.conv": "blocks.1.body",
        "features.5.conv": "blocks.2.body",
        "features.6.conv": "blocks.3.body",
    },
)
