"""A small vision transformer for images of 32 x 32 pixels, as a `torch.nn.Module`.

Source: Dosovitskiy et al., 'An Image is Worth 16x16 Words' (arXiv:2010.11929), with patches of 4
pixels and narrower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.backends.torch_backend.layers import Dropout, LayerNorm, convolution

DROPOUT = 0.1  # after embedding, attention and each dense layer of a block


class ViT(nn.Module):
    """Images (n, 3, 32, 32) to logits (n, classes)."""

    def __init__(self, classes: int, device: str = "cpu") -> None:
        super().__init__()
        Conv2d = convolution(device)
        self.patches = Conv2d(3, 64, kernel_size=4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 64))
        self.position = nn.Parameter(torch.zeros(1, 1 + 8 * 8, 64))
        self.dropout = Dropout(DROPOUT, (1 + 8 * 8, 64))
        self.blocks = nn.ModuleList([Block(tokens=1 + 8 * 8, width=64, heads=4) for _ in range(4)])
        self.norm = LayerNorm(64, eps=1e-6)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = x.flatten(start_dim=2).transpose(1, 2)  # (n, 8 * 8, 64), row by row
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.fc(x[:, 0])  # the class token


class Block(nn.Module):
    """Tokens (n, tokens, width) to the same shape."""

    def __init__(self, tokens: int, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.dropout1 = Dropout(DROPOUT, (tokens, width))
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.dropout2 = Dropout(DROPOUT, (tokens, 4 * width))
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout3 = Dropout(DROPOUT, (tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout1(self.attention(self.norm1(x)))
        y = self.dropout2(F.gelu(self.fc1(self.norm2(x)), approximate="none"))
        return x + self.dropout3(self.fc2(y))


class Attention(nn.Module):
    """Tokens (n, tokens, width) to the same shape: softmax(query key^T / sqrt(width / heads))
    value, head by head.

    Source: Vaswani et al., 'Attention Is All You Need' (arXiv:1706.03762), section 3.2.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        # Without a bias: it would add the same to all scores of a query and change no weight, and
        # its gradient would be rounding error.
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        split = (n, tokens, self.heads, width // self.heads)
        query, key, value = (
            self.query(x).reshape(split),
            self.key(x).reshape(split),
            self.value(x).reshape(split),
        )
        scores = torch.einsum("nqhd,nkhd->nhqk", query, key) / (width // self.heads) ** 0.5
        weights = F.softmax(scores, dim=-1)
        x = torch.einsum("nhqk,nkhd->nqhd", weights, value)
        return self.out(x.reshape(n, tokens, width))
