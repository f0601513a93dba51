"""Depthwise convolution of NHWC maps, with the layout and precision of each pass chosen for the device.

On a CPU, torch 2.15's weight gradient of a 7x7 costs 5 to 40 times the forward pass. But it is a depthwise convolution
itself, of the input with the output's gradient for a kernel as large as the map, and that forward pass is 2 to 6 times
as fast; that of a 3x3 is fast as it is. Either is taken in fp32: in bf16 it is slower. Figures: tests/bench/RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops import kernels, products


class Taps(NamedTuple):
    """Weight (C, 1, K, K) and bias (C,) or None of a depthwise convolution, and their values in the maps' dtype.

    The first two are for who asks their gradients, which are sums over the map in float32.
    """

    weight: Tensor
    bias: Tensor | None
    narrow_weight: Tensor
    narrow_bias: Tensor | None


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, narrow: tuple[Tensor, Tensor | None] | None = None
) -> Tensor:
    """Depthwise convolution, stride 1, zeros around the map: (B, H, W, C) -> (B, H, W, C), contiguous.

    Args:
        x: any strides over positions; may be a slice of the channels of a wider map.
        weight: (C, 1, K, K), K odd, of any floating dtype: it is used in that of `x`.
        bias: (C,) or None.
        narrow: both in the dtype of `x`, where they are at hand.
    """
    if kernels.exported():
        return _plain(x, weight, bias)
    return _Depthwise.apply(x, weight, bias, *(narrow or (weight.detach(), None if bias is None else bias.detach())))


def kernel_taps(weights: Sequence[Tensor]) -> list[Tensor]:
    """The values of weights of one shape, laid out as the Triton kernels read them."""
    from pipeline.ops.triton import depthwise as depthwise_triton

    with torch.no_grad():
        return depthwise_triton.tap_by_tap(weights)


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
        from pipeline.ops.triton import depthwise as depthwise_triton

        return depthwise_triton.depthwise(x, weight, bias, 1.0)
    return _plain(x, weight, bias)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if products.widens(x):
        return _plain(x.float(), weight, bias).to(x.dtype)
    planes = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    return planes.permute(0, 2, 3, 1).contiguous()


def _input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    if kernels.usable(dy):
        from pipeline.ops.triton import depthwise as depthwise_triton

        return depthwise_triton.depthwise_backward_input(dy, weight, 1.0, None)
    if products.widens(dy):
        return _input_gradient(dy.float(), weight.to(dy.dtype)).to(dy.dtype)
    planes = dy.permute(0, 3, 1, 2)
    dx, _, _ = _convolution_backward(planes, planes, weight.to(dy.dtype), [True, False, False])  # of x the shape alone
    return dx.permute(0, 2, 3, 1).contiguous()


def _weight_gradients(dy: Tensor, x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    if kernels.usable(x):
        from pipeline.ops.triton import depthwise as depthwise_triton

        return depthwise_triton.depthwise_backward_weight(dy, x, side, 1.0)
    wide = products.sum_dtype(x.dtype)
    planes_dy, planes_x = dy.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    dtype = x.dtype
    if x.device.type == "cpu":
        dtype = wide
        correlate = side > 3 and wide == torch.float32
        layout = torch.contiguous_format if correlate else torch.channels_last
        planes_dy, planes_x = (each.to(wide, memory_format=layout) for each in (planes_dy, planes_x))
        if correlate:
            return _correlation(planes_dy, planes_x, side), dy.sum((0, 1, 2), dtype=wide)
    weight = x.new_empty(x.shape[-1], 1, side, side, dtype=dtype)
    _, dweight, dbias = _convolution_backward(planes_dy, planes_x, weight, [False, True, True])
    return dweight.to(wide), dbias.to(wide)


def _correlation(dy: Tensor, x: Tensor, side: int) -> Tensor:
    """The weight gradient (C, 1, side, side) of maps (B, C, H, W), every map of every sample a channel of one image."""
    batch, channels, height, width = x.shape
    maps = batch * channels
    as_kernels = dy.reshape(maps, 1, height, width)
    sums = F.conv2d(x.reshape(1, maps, height, width), as_kernels, padding=side // 2, groups=maps)
    return sums.view(batch, channels, 1, side, side).sum(0)


def _backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _input_gradient(dy, weight), *_weight_gradients(dy, x, weight.shape[-1])


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Any:
    channels, padding = x.shape[1], weight.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        *(dy, x, weight, [channels], [1, 1], [padding] * 2, [1, 1], False, [0, 0], channels, wanted)
    )


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _weight: Tensor, _bias: Any, weight: Tensor, bias: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        return depthwise_forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return *depthwise_backward(dy.contiguous(), x, weight, ctx.needs_input_grad[:3]), None, None


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
    wide = products.sum_dtype(x.dtype)
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=wide), x.new_empty(x.shape[-1:], dtype=wide)


_operators = torch.ops.hornet_pretraining
