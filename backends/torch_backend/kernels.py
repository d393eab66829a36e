"""Convolution and pooling as matrix products and comparisons: the library's results up to rounding,
faster on the CPU. Reads next to backends/flax_backend/kernels.py.

The measurements are in results/bench/LOG.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

FEW_CHANNELS = 3  # those of images, which need no gradient


class Im2colConv2d(nn.Conv2d):
    """`nn.Conv2d`, by `im2col_conv` where that is faster and possible: compiled, and for the images
    in float64."""

    def forward(self, input: Tensor) -> Tensor:
        few_channels = input.dtype == torch.float64 and self.in_channels <= FEW_CHANNELS
        faster = few_channels or torch.compiler.is_compiling()
        if not (faster and self.supports(input)):
            return super().forward(input)
        return im2col_conv(input, self.weight, self.bias)

    def supports(self, input: Tensor) -> bool:
        """Whether there is no padding, stride, dilation or group, and both the input and the output
        have an even number of pixels."""
        _, _, height, width = input.shape
        kernel_height, kernel_width = self.kernel_size
        is_plain = (
            self.padding == (0, 0) and self.stride == self.dilation == (1, 1) and self.groups == 1
        )
        odd_kernel = kernel_height % 2 == kernel_width % 2 == 1
        return is_plain and odd_kernel and height % 2 == width % 2 == 0


def im2col_conv(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution as one matrix product, each row of which gives 2 x 2 pixels.

    A row holds the patch that the four pixels see, which is one pixel larger than the kernel; the
    matrix holds the kernel four times, shifted by a pixel each. For a 5 x 5 kernel that is 44 %
    more multiplications than with one pixel a row, but a third of the copying, and a product with
    four times as many columns.

    Args:
        images: (n, channels, height, width).
        weight: (features, channels, kernel height, kernel width).
        bias: (features,).

    Returns:
        (n, features, height - kernel height + 1, width - kernel width + 1).
    """
    images, kernel = images.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0)
    n, height, width, channels = images.shape
    kernel_height, kernel_width, _, features = kernel.shape
    # `unfold` copies patches faster, but its gradient would be slow.
    if channels <= FEW_CHANNELS:
        pixel_rows = images.reshape(n, height, width * channels)
        patches = pixel_rows.unfold(1, kernel_height + 1, 2).unfold(
            2, (kernel_width + 1) * channels, 2 * channels
        )
        _, height, width, _, _ = patches.shape  # from here on, of the blocks of 2 x 2 pixels
    else:
        # even rows and odd rows, their pixels by twos
        row_pairs = images.reshape(n, height // 2, 2, width // 2, 2 * channels).unbind(2)
        height, width = (height - kernel_height + 1) // 2, (width - kernel_width + 1) // 2
        views = [
            row_pairs[y % 2][:, y // 2 : y // 2 + height, x : x + width]
            for y in range(kernel_height + 1)
            for x in range((kernel_width + 1) // 2)
        ]
        patches = torch.cat(views, dim=-1)
    patches = patches.reshape(n * height * width, -1)
    shifted = [F.pad(kernel, (0, 0, 0, 0, x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)]
    matrix = torch.stack(shifted, dim=3).reshape(-1, 4 * features)
    product = patches @ matrix if bias is None else torch.addmm(bias.repeat(4), patches, matrix)
    product = product.reshape(n, height, width, 2, 2, features).transpose(2, 3)
    return product.reshape(n, 2 * height, 2 * width, features).permute(0, 3, 1, 2)


class Pool2x2(nn.MaxPool2d):
    """`nn.MaxPool2d`; compiled, by comparisons where the windows are 2 x 2 pixels and do not
    overlap.

    Compiled, the gradient of PyTorch's own searches each window for the largest pixel.
    """

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not (self.supports(input) and torch.compiler.is_compiling()):
            return super().forward(input)
        n, channels, height, width = input.shape
        pixels = (
            input.permute(0, 2, 3, 1)
            .reshape(n, height // 2, 2, width // 2, 2, channels)
            .transpose(2, 3)
        )
        a, b, c, d = pixels.reshape(n, height // 2, width // 2, 4, channels).unbind(3)
        largest = maximum_first(maximum_first(a, b), maximum_first(c, d))
        return largest.permute(0, 3, 1, 2)

    def supports(self, input: Tensor) -> bool:
        _, _, height, width = input.shape
        is_plain = self.kernel_size == self.stride == 2 and self.padding == 0 and self.dilation == 1
        even = height % 2 == width % 2 == 0
        return is_plain and even and not (self.ceil_mode or self.return_indices)


def maximum_first(a: Tensor, b: Tensor) -> Tensor:
    """`torch.maximum`; of equal values the first gets the gradient, as in `nn.MaxPool2d`."""
    return _MaximumFirst.apply(a, b)


class _MaximumFirst(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), (gradient,) = ctx.saved_tensors, gradients
        # Two spellings of one condition, or Inductor would write it to memory, which is slower.
        return torch.where(a < b, 0.0, gradient), torch.where(b > a, gradient, 0.0)
