"""What stands before each stage: the stem, and the downsamplings between stages.

A convolution whose stride is its size is a linear layer on patches: one matrix product on NHWC maps.
"""

from __future__ import annotations

from typing import cast

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from pipeline.ops import recompute
from pipeline.ops.layers import NORM_EPS, layer_norm, linear, norm_of, patch_weight, patches


def make_stem(in_chans: int, dim: int) -> nn.Sequential:
    """A 4x4 convolution of stride 4, then LayerNorm."""
    return nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4), LayerNorm2d(dim, eps=NORM_EPS))


def make_downsampling(narrow: int, wide: int) -> nn.Sequential:
    """LayerNorm, then a 2x2 convolution of stride 2."""
    return nn.Sequential(LayerNorm2d(narrow, eps=NORM_EPS), nn.Conv2d(narrow, wide, 2, stride=2))


def downsample(layers: nn.Module, x: Tensor, lean: bool) -> Tensor:
    """`layers` (of `make_stem` or `make_downsampling`) on an NHWC map: (B, H, W, in) -> (B, H // s, W // s, out).

    Rows and columns that fill no patch are left out, as by the convolution.
    lean: keep the input of the LayerNorm for the backward pass, and not its output.
    """
    first, second = layers.children()
    is_stem = isinstance(first, nn.Conv2d)
    conv, norm = (
        cast(nn.Conv2d, first if is_stem else second),
        norm_of(cast(nn.LayerNorm, second if is_stem else first)),
    )
    side, weight, bias = conv.stride[0], patch_weight(conv.weight).to(x.dtype), cast(Tensor, conv.bias).to(x.dtype)
    lean = lean and torch.is_grad_enabled()
    if is_stem:
        return layer_norm(linear(patches(_whole_patches(x, side), side), weight, bias), norm)
    x = _whole_patches(x, side).contiguous()
    if lean:
        return recompute.norm_patch_linear(x, norm, weight, bias, side)
    return linear(patches(layer_norm(x, norm), side), weight, bias)


def _whole_patches(x: Tensor, side: int) -> Tensor:
    height, width = x.shape[1:3]
    if height % side == 0 and width % side == 0:
        return x
    return x[:, : height - height % side, : width - width % side]
