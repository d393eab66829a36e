"""VGG-11 with batch norm, for images of 32 x 32 pixels, of an eighth of its width."""

from flax import nnx
from torch import nn

from lockstep import Pair
from lockstep.backends.flax_backend.layers import BatchNorm

PLAN = (8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M")


class VGG(nn.Module):
    def __init__(self, classes):
        super().__init__()
        layers, width = [], 3
        for item in PLAN:
            if item == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [
                    nn.Conv2d(width, item, 3, padding=1),
                    nn.BatchNorm2d(item),
                    nn.ReLU(True),
                ]
                width = item
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        layers, width = [], 3
        for item in PLAN:
            if item == "M":
                layers.append(lambda x: nnx.max_pool(x, (2, 2), strides=(2, 2)))
            else:
                layers.append(nnx.Conv(width, item, (3, 3), padding=1, rngs=rngs))
                layers += [BatchNorm(item, momentum=0.9, epsilon=1e-5, rngs=rngs), nnx.relu]
                width = item
        self.features = nnx.Sequential(*layers)
        self.classifier = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        x = self.features(x)
        return self.classifier(x.reshape(len(x), -1))


PAIR = Pair(VGG, Port)
