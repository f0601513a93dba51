"""Depthwise convolution of NHWC maps, with the layout and precision of each pass chosen for the device.

On a CPU the weight gradient costs 5 to 40 times the forward pass. In channels_last memory it is up to 4 times as fast
as in planes, but has a cost of its own, like that of a large batch, above 512 channels: so it goes by as many at a
time. In bf16 it is 2 to 10 times as slow as in fp32: so it is taken in fp32. Figures: tests/bench/RESULTS.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops import kernels

CHANNELS_AT_ONCE = 512  # of a CPU's weight gradient


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution, stride 1, zeros around the map: (B, H, W, C) -> (B, H, W, C), contiguous.

    Args:
        x: any strides over positions; may be a slice of the channels of a wider map.
        weight: (C, 1, K, K), K odd, of any floating dtype: it is used in that of `x`.
        bias: (C,) or None.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # what leaves this process knows PyTorch's alone
        return _plain(x, weight, bias)
    return _Depthwise.apply(x, weight, bias)


def depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`depthwise` without autograd."""
    return _operators.depthwise(x, weight, bias) if torch.compiler.is_compiling() else _forward(x, weight, bias)


def depthwise_backward(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) of `depthwise`, or None where not `wanted`; the last two in float32, or in `x`'s float64."""
    if torch.compiler.is_compiling():
        found = _operators.depthwise_backward(dy, x, weight)
        return tuple(each if want else None for each, want in zip(found, wanted, strict=True))  # type: ignore[return-value]
    dx = _input_gradient(dy, weight) if wanted[0] else None
    dweight, dbias = _weight_gradients(dy, x, weight.shape[-1]) if wanted[1] or wanted[2] else (None, None)
    return dx, dweight, dbias if wanted[2] else None


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if kernels.usable(x):
        from pipeline.ops import depthwise_triton

        return depthwise_triton.depthwise(x, weight, bias, 1.0)
    return _plain(x, weight, bias)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    planes = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    return planes.permute(0, 2, 3, 1).contiguous()


def _input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    if kernels.usable(dy):
        from pipeline.ops import depthwise_triton

        return depthwise_triton.depthwise_backward_input(dy, weight, 1.0, None)
    planes = dy.permute(0, 3, 1, 2)
    dx, _, _ = _convolution_backward(planes, planes, weight.to(dy.dtype), [True, False, False])  # of x the shape alone
    return dx.permute(0, 2, 3, 1).contiguous()


def _weight_gradients(dy: Tensor, x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    if kernels.usable(x):
        from pipeline.ops import depthwise_triton

        return depthwise_triton.depthwise_backward_weight(dy, x, side, 1.0)
    wide = torch.promote_types(x.dtype, torch.float32)
    at_once, dtype = (CHANNELS_AT_ONCE, wide) if x.device.type == "cpu" else (x.shape[-1], x.dtype)
    parts = [planes.permute(0, 3, 1, 2).to(dtype).split(at_once, 1) for planes in (dy, x)]
    sums = [_weight_gradient(dy_, x_, side) for dy_, x_ in zip(*parts, strict=True)]
    dweight, dbias = (torch.cat(each).to(wide) for each in zip(*sums, strict=True))
    return dweight, dbias


def _backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _input_gradient(dy, weight), *_weight_gradients(dy, x, weight.shape[-1])


def _weight_gradient(dy: Tensor, x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    dy, x = (planes.contiguous(memory_format=torch.channels_last) for planes in (dy, x))
    _, dweight, dbias = _convolution_backward(dy, x, x.new_empty(x.shape[1], 1, side, side), [False, True, True])
    return dweight, dbias


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Any:
    channels, padding = x.shape[1], weight.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        *(dy, x, weight, [channels], [1, 1], [padding] * 2, [1, 1], False, [0, 0], channels, wanted)
    )


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        return depthwise_forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return depthwise_backward(dy.contiguous(), x, weight, ctx.needs_input_grad)


# What torch.compile sees: one opaque operator each way, for it has no template of a depthwise convolution, and chooses
# the layout of a library's on its own.
_library = torch.library.Library("hornet_pretraining", "FRAGMENT")
_library.define("depthwise(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("depthwise_backward(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)")
_library.impl("depthwise", _forward, "CompositeExplicitAutograd")
_library.impl("depthwise_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("hornet_pretraining::depthwise")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("hornet_pretraining::depthwise_backward")
def _(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=wide), x.new_empty(x.shape[-1:], dtype=wide)


_operators = torch.ops.hornet_pretraining
