"""What decoders are made of: a convolution or a gnConv, then a LayerNorm and a ReLU.

Maps are (B, C, H, W) in channels_last memory, as the backbone gives them, and in the dtype of `compute_maps`, inside
which autocast is off; parameters are in any dtype.

The published decoders have batch norm, synchronised over all ranks. Here it is LayerNorm over the channels of each
position, with as many parameters: it needs no statistics of a batch, so that a net has no buffers, ranks do not wait
for each other within a pass, and crops are normalised in training as whole images are in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.plug_in import GnConvOnMaps
from pipeline.ops import products
from pipeline.ops.layers import NORM_EPS, as_planes, compute_dtype, layer_norm, no_autocast, norm_of


@contextmanager
def compute_maps(maps: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`maps` in the dtype of autocast, where it is on, which is off inside the block: see `ops.layers`."""
    dtype = compute_dtype(maps[0]) or maps[0].dtype
    with no_autocast(maps[0].device.type):
        yield [each.to(dtype) for each in maps]


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` on (B, C, H, W), in the dtype of `x`."""
    if products.widens(x):
        return convolve(x.float(), conv).to(x.dtype)
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    return F.conv2d(x, conv.weight.to(x.dtype), bias, conv.stride, conv.padding)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W) of `like`: bilinear, as the published decoders (corners not aligned)."""
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


class ConvNorm(nn.Module):
    """Convolution of `kernel` without bias, LayerNorm, ReLU: (B, in_channels, H, W) -> (B, channels, H, W)."""

    def __init__(self, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return _norm_relu(convolve(x, self.conv), self.norm)

    def init_weights(self) -> None:
        """He et al. 2015, by the fan out."""
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.norm.reset_parameters()


class GnConvNorm(nn.Module):
    """A gnConv of order 2, not scaled as published, LayerNorm, ReLU: what stands in the place of a `ConvNorm`."""

    def __init__(self, in_channels: int, channels: int, filter_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.conv = GnConvOnMaps(in_channels, channels, filter_size)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return _norm_relu(self.conv(x), self.norm)

    def init_weights(self) -> None:
        """See `GnConvOnMaps`."""
        self.conv.init_weights()
        self.norm.reset_parameters()


class Classifier(nn.Module):
    """Whole channels dropped out, then a 1x1 convolution: (B, channels, H, W) -> logits (B, num_classes, H, W).

    In eval mode in the dtype of the parameters, whatever autocast says: rounded logits are equal where classes are not.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.conv = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return convolve(x.to(self.conv.weight.dtype), self.conv)
        if self.dropout > 0:
            # Drawn from the CPU's generator, as drop path is: the same on every device.
            kept = torch.empty(x.shape[0], x.shape[1], 1, 1, device="cpu").bernoulli_(1 - self.dropout)
            x = x * (kept / (1 - self.dropout)).to(x)
        return convolve(x, self.conv)

    def init_weights(self) -> None:
        """Small, so that all classes begin alike."""
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(cast(Tensor, self.conv.bias))


def init_children(module: nn.Module) -> None:
    """The initial values of all that stands below `module` and knows its own."""
    for child in module.modules():
        if child is not module and isinstance(child, ConvNorm | GnConvNorm | Classifier):
            child.init_weights()


def _norm_relu(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """(B, C, H, W) in channels_last memory."""
    return as_planes(layer_norm(x.permute(0, 2, 3, 1).contiguous(), norm_of(norm)).relu())
