"""The same function with fewer operations, for inference: scales and affine parameters folded into their neighbours."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pipeline.models.block import Block
from pipeline.models.hornet import HorNet
from pipeline.ops.global_filter import GlobalLocalFilter


@torch.no_grad()
def fuse_for_inference(model: HorNet) -> HorNet:
    """Fold what is linear into the neighbouring weights, in place; returns `model`, in eval mode and without gradients.

    Layer scales go into the projections before them, the affine parameters of norms into the linear layers behind them
    (those of the filter's norms stay: padding, and a product, lie between), and the depthwise scale into the depthwise
    weights or the filter's last norm. Outputs, those without a head too, are equal up to rounding. The state dict is
    another afterwards, so copy the model first (`copy.deepcopy`) where the original is still needed.

    Raises:
        ValueError: `model` was fused before, or is no HorNet: of a model made with `features_only`, fuse its `.model`.
    """
    if not isinstance(model, HorNet):
        hint = "; of a model made with features_only, pass its `.model`" if hasattr(model, "model") else ""
        raise ValueError(f"fuse_for_inference takes a HorNet, got {type(model).__name__}{hint}")
    blocks = [cast(Block, block) for stage in model.stages for block in stage.children()]
    if any(block.gamma1 is None for block in blocks):
        raise ValueError("this model is fused already: fuse_for_inference changes it in place, once is enough")
    model.eval().requires_grad_(False)
    for block in blocks:
        gnconv = block.gnconv
        _fold_norm(block.norm1, gnconv.proj_in)
        _fold_norm(block.norm2, block.pwconv1)
        _fold_scale(gnconv.proj_out, cast(Tensor, block.gamma1))
        _fold_scale(block.pwconv2, cast(Tensor, block.gamma2))
        block.gamma1 = block.gamma2 = None
        block.drop_path_rate = 0.0  # its factor is part of the scale
        last = gnconv.dwconv.post_norm if isinstance(gnconv.dwconv, GlobalLocalFilter) else gnconv.dwconv
        _fold_scale(last, torch.tensor(gnconv.scale))
        gnconv.scale = 1.0
    for layer in list(model.downsample_layers)[1:]:
        norm, conv = cast(nn.Sequential, layer)
        _fold_norm(norm, conv)
    return model


def _fold_scale(layer: nn.Module, scale: Tensor) -> None:
    """Multiply the output of a convolution, linear layer or norm, for each channel or all."""
    weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
    weight.mul_(scale.to(weight).view(-1, *[1] * (weight.ndim - 1)))
    bias.mul_(scale.to(bias))


def _fold_norm(norm: nn.Module, layer: nn.Module) -> None:
    """Move the affine parameters of `norm` into the convolution (no padding) or linear layer behind it."""
    weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
    columns = [1, -1] + [1] * (weight.ndim - 2)
    bias.add_((weight * cast(Tensor, norm.bias).view(columns)).flatten(1).sum(1))
    weight.mul_(cast(Tensor, norm.weight).view(columns))
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)
