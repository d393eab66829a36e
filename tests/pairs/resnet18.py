"""torchvision's ResNet-18, as it is, and a port of it."""

from functools import partial
from typing import Any

import torchvision
from flax import nnx

from lockstep import Pair
from lockstep.backends.flax_backend.layers import BatchNorm

PADDING: Any = ((1, 1), (1, 1))  # Flax's own type says only texts
norm = partial(BatchNorm, momentum=0.9, epsilon=1e-5)


def conv(inputs, width, kernel, stride, rngs):
    padding = kernel // 2
    size = (kernel, kernel)
    return nnx.Conv(inputs, width, size, strides=stride, padding=padding, use_bias=False, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, inputs, width, stride, rngs):
        self.conv1, self.bn1 = conv(inputs, width, 3, stride, rngs), norm(width, rngs=rngs)
        self.conv2, self.bn2 = conv(width, width, 3, 1, rngs), norm(width, rngs=rngs)
        shortcut = []
        if stride > 1 or inputs != width:
            shortcut = [conv(inputs, width, 1, stride, rngs), norm(width, rngs=rngs)]
        self.downsample = nnx.Sequential(*shortcut)

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + self.downsample(x))


class ResNet(nnx.Module):
    def __init__(self, classes, rngs):
        self.conv1, self.bn1 = conv(3, 64, 7, 2, rngs), norm(64, rngs=rngs)
        self.layer1 = nnx.List([Block(64, 64, 1, rngs), Block(64, 64, 1, rngs)])
        self.layer2 = nnx.List([Block(64, 128, 2, rngs), Block(128, 128, 1, rngs)])
        self.layer3 = nnx.List([Block(128, 256, 2, rngs), Block(256, 256, 1, rngs)])
        self.layer4 = nnx.List([Block(256, 512, 2, rngs), Block(512, 512, 1, rngs)])
        self.fc = nnx.Linear(512, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=PADDING)
        for block in [*self.layer1, *self.layer2, *self.layer3, *self.layer4]:
            x = block(x)
        return self.fc(x.mean((1, 2)))


PAIR = Pair(lambda classes: torchvision.models.resnet18(num_classes=classes), ResNet)
