"""Convolution and pooling as the device likes them best and norms as they sum best, with the
numbers of the library, up to rounding; and dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW_CHANNELS = 3  # those of images, which need no gradient


def convolution(device: str) -> type[nn.Conv2d]:
    """The layer to convolve with on `device`: on the CPU, one that is a matrix product where that
    is quicker.

    Training steps per second of `Net` on two cores, torch 2.15, in turn. At batch 4 in float32:
    eager 537; compiled, with the library's convolution 904 and with the matrix product 1,150; later
    2,054, and with the images' windows taken by `unfold` 2,328. Eager, the product is slower, but
    for the first convolution in float64: batch 32 158 in place of 91, with one thread 112 in place
    of 67; batch 128 44 in place of 14.
    """
    return Im2colConv2d if device == "cpu" else nn.Conv2d


def max_pooling(device: str) -> nn.MaxPool2d:
    """The largest of each 2 x 2 pixels: (n, channels, height, width) to (n, channels, height / 2,
    width / 2)."""
    return (Pool2x2 if device == "cpu" else nn.MaxPool2d)(kernel_size=2, stride=2)


class Im2colConv2d(nn.Conv2d):
    """`nn.Conv2d`, by `im2col_conv` where that is quicker and can do it."""

    def forward(self, input: Tensor) -> Tensor:
        _, _, height, width = input.shape
        kernel_height, kernel_width = self.kernel_size
        quicker = (
            input.dtype == torch.float64 and self.in_channels <= FEW_CHANNELS
        ) or torch.compiler.is_compiling()
        plain = (
            self.padding == (0, 0) and self.stride == self.dilation == (1, 1) and self.groups == 1
        )
        # and with it an even number of pixels, from an even one
        odd = kernel_height % 2 == kernel_width % 2 == 1
        if not (quicker and plain and odd and height % 2 == width % 2 == 0):
            return super().forward(input)
        return im2col_conv(input, self.weight, self.bias)


def im2col_conv(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution as one matrix product, each row of which gives 2 x 2 pixels.

    A row holds what the four pixels see, a window that is one larger than the kernel; the matrix
    holds the kernel four times, moved by a pixel. For a 5 x 5 kernel that is 44 % more
    multiplications than with one pixel a row, but a third of the copying, and a product with four
    times as many columns.
    """
    images, kernel = images.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0)
    n, height, width, channels = images.shape
    kernel_height, kernel_width, _, features = kernel.shape
    # windows by `unfold` are copied more quickly, but their gradient would be slow
    if channels <= FEW_CHANNELS:
        row_pairs = images.reshape(n, height, width * channels)
        windows = row_pairs.unfold(1, kernel_height + 1, 2).unfold(
            2, (kernel_width + 1) * channels, 2 * channels
        )
        _, height, width, _, _ = windows.shape  # from here on, of the blocks
    else:
        # even and odd; pixels by twos
        row_pairs = images.reshape(n, height // 2, 2, width // 2, 2 * channels).unbind(2)
        height, width = (height - kernel_height + 1) // 2, (width - kernel_width + 1) // 2
        views = [
            row_pairs[y % 2][:, y // 2 : y // 2 + height, x : x + width]
            for y in range(kernel_height + 1)
            for x in range((kernel_width + 1) // 2)
        ]
        windows = torch.cat(views, dim=-1)
    patches = windows.reshape(n * height * width, -1)
    shifted = [F.pad(kernel, (0, 0, 0, 0, x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)]
    matrix = torch.stack(shifted, dim=3).reshape(-1, 4 * features)
    product = patches @ matrix if bias is None else torch.addmm(bias.repeat(4), patches, matrix)
    product = product.reshape(n, height, width, 2, 2, features).transpose(2, 3)
    return product.reshape(n, 2 * height, 2 * width, features).permute(0, 3, 1, 2)


class Pool2x2(nn.MaxPool2d):
    """`nn.MaxPool2d`; compiled, by comparing twos where the windows are 2 x 2 pixels beside one
    another.

    Compiled, the gradient of PyTorch's own looks for each pixel where in its window the largest is.
    """

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        n, channels, height, width = input.shape
        plain = self.kernel_size == self.stride == 2 and self.padding == 0 and self.dilation == 1
        plain = (
            plain and height % 2 == width % 2 == 0 and not (self.ceil_mode or self.return_indices)
        )
        if not (plain and torch.compiler.is_compiling()):
            return super().forward(input)
        pixels = (
            input.permute(0, 2, 3, 1)
            .reshape(n, height // 2, 2, width // 2, 2, channels)
            .transpose(2, 3)
        )
        a, b, c, d = pixels.reshape(n, height // 2, width // 2, 4, channels).unbind(3)
        largest = maximum_first(maximum_first(a, b), maximum_first(c, d))
        return largest.permute(0, 3, 1, 2)


def maximum_first(a: Tensor, b: Tensor) -> Tensor:
    """`torch.maximum`, but that of equal ones the first gets the gradient, as in `nn.MaxPool2d`."""
    return _FirstOfLarger.apply(a, b)


class _FirstOfLarger(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), (gradient,) = ctx.saved_tensors, gradients
        # Said in two ways: what is used twice, inductor keeps in memory, which takes longer.
        return torch.where(a < b, 0.0, gradient), torch.where(b > a, gradient, 0.0)


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`; in float64 on the CPU, uncompiled, summed in stages, not one value after
    the other.

    Of 16 x 32 x 32 values of a channel, the library's result was off by 30 to 680 times 1e-16 of
    the largest, more where many values are alike; this one's by 3, that of compiled code and of JAX
    by 2 to 7. ResNet-20, with nineteen in a row, amplified that past 1e-12 within two steps, and no
    twin showed it, since all sums of one side go wrong alike. In float32 the library adds up in
    float64.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def forward(self, input: Tensor) -> Tensor:
        alone = (
            input.dtype == torch.float64
            and input.device.type == "cpu"
            and not torch.compiler.is_compiling()
        )
        fits = input.ndim == 4 and input.shape[1] == self.num_features and input[:, 0].numel() > 1
        if not (self.training and alone and fits):
            return super().forward(input)
        axes, pixels = (0, 2, 3), input[:, 0].numel()
        mean = input.mean(axes, keepdim=True)
        centred = input - mean
        var = centred.square().mean(axes, keepdim=True)
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * (pixels / (pixels - 1)), self.momentum)
        weight, bias = self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
        return centred * (torch.rsqrt(var + self.eps) * weight) + bias


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`; on the CPU, too, bfloat16 is computed in float32, and rounded once.

    There the library sums the gradients of scale and bias in bfloat16. Over 32 times 65 tokens,
    ViT's were off by up to 37 % of the largest, by float64's; now by 1 %.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.bfloat16 or input.device.type != "cpu":
            return super().forward(input)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(
            input.dtype
        )


class Dropout(nn.Module):
    """`nn.Dropout`, but that it is told what to keep: before each training step, `mask` is drawn by
    `lockstep.common.data.dropout`.

    Args:
        rate: the share that is left out, 0 <= rate < 1; what is kept is divided by 1 - rate.
        shape: of what is drawn for one image, as the layer sees it. Along axes of size 1, all is
            kept or left out together: `(1, 1, 1)` leaves out all of an image, as in stochastic
                depth.
        channels_first: that of the three axes the channels come first, which is Flax's last axis.
    """

    mask: Tensor  # bool (n, *shape); no part of the module's state

    def __init__(self, rate: float, shape: tuple[int, ...], channels_first: bool = False) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"a rate of {rate:g}: give 0 or more, and less than 1")
        self.rate, self.channels_first = rate, channels_first
        self.register_buffer("mask", torch.ones(1, *shape, dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask / (1 - self.rate) if self.training else x
