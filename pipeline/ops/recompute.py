"""The block's operators as autograd Functions that keep products of matrices and convolutions, and recompute the rest.

Each joins a cheap prologue (LayerNorm, GELU; in `recompute_gating.py` a gating product) to the linear layer behind it.
Plain autograd keeps the prologue's output for the weight gradient; these keep its input, which is there anyway, and go
through the prologue once more in the backward pass: no matrix product is done twice, and about half of the bytes are
kept. With `keep` they keep it too, as plain autograd does. Every Function, those of `recompute_filter.py` among them,
equals its plain spelling in `gnconv.py` and `models/block.py` in value and gradient (a test holds them equal).

All activations (B, H, W, C) in one dtype, contiguous; weights of linear layers (out, in) in that dtype, affine
parameters of norms in any. `rows` are the samples of the batch that drop path keeps (int64, ascending), or None for
all; `position` is for the kernels, (B,): where in `rows` each sample is, or -1.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops import primitives
from pipeline.ops.layers import Norm, patches, unpatched
from pipeline.ops.products import input_gradient, linear, weight_gradients


def norm_linear(
    x: Tensor,
    norm: Norm,
    layer: tuple[Tensor, Tensor],
    parts: tuple[int, ...] = (),
    rows: Tensor | None = None,
    position: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    """LayerNorm, then a linear layer: (x, its output), or (x, outputs of `parts` channels each, contiguous).

    The `x` that is returned is `x`: who adds a residual to it has both gradients of `x` summed in one pass.
    """
    return _NormLinear.apply(x, rows, position, *norm, 1, parts or (layer[1].shape[0],), keep, *layer)


def norm_patch_linear(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor, patch: int) -> Tensor:
    """LayerNorm, then a convolution of size and stride `patch`: (B, H, W, C) -> (B, H / patch, W / patch, out).

    weight: (out, patch * patch * C), over (row, column, channel) of the patch.
    """
    return _NormLinear.apply(x, None, None, *norm, patch, (weight.shape[0],), False, weight, bias)[1]


def gelu_linear(h: Tensor, weight: Tensor, bias: Tensor, keep: bool = False) -> Tensor:
    """Linear layer of GELU(h)."""
    return _GeluLinear.apply(h, keep, weight, bias)


def norm_mlp(
    x: Tensor,
    norm: Norm,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    rows: Tensor | None = None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm, linear, GELU, linear: (x, output). Keeps `x` alone: the first product is done again in backward."""
    return _NormMlp.apply(x, rows, position, *norm, *first, *second)


def add_rows(x: Tensor, f: Tensor, rows: Tensor | None, position: Tensor | None = None) -> Tensor:
    """The residual: `x` plus `f` at the samples `rows`."""
    return _AddRows.apply(x, f, rows, position)


def take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """The samples `rows` of `x`."""
    return x if rows is None else _TakeRows.apply(x, rows)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Any,
        position: Any,
        weight: Any,
        bias: Any,
        eps: float,
        patch: int,
        parts: tuple[int, ...],
        keep: bool,
        w: Tensor,
        b: Tensor,
    ) -> Any:
        inputs = x if rows is None else x[rows]
        y, mean, rstd = primitives.layer_norm(inputs, weight, bias, eps)
        y = patches(y, patch)
        ctx.eps, ctx.patch, ctx.parts, ctx.keep = eps, patch, parts, keep
        ctx.save_for_backward(inputs, mean, rstd, rows, position, weight, bias, w, y if keep else None)
        # A product each: outputs that are slices of one would be copied by the convolution behind them.
        return x.view_as(x), *(linear(y, *layer) for layer in zip(w.split(parts), b.split(parts), strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dresidual: Tensor, *douts: Tensor) -> Any:
        inputs, mean, rstd, rows, position, weight, bias, w, y = ctx.saved_tensors
        wanted = ctx.needs_input_grad[9:]
        if y is None and wanted[0]:
            y = patches(primitives.layer_norm_apply(inputs, mean, rstd, weight, bias, ctx.eps), ctx.patch)
        layers = w.split(ctx.parts)
        if len(douts) > 1 and (ctx.keep or inputs.element_size() == 2):  # fewer and larger products, for one pass more
            douts, layers = (torch.cat(douts, -1),), (w,)
        dlayers = [weight_gradients(dout, y, wanted) for dout in douts]
        dlayer = dlayers[0] if len(dlayers) == 1 else [_joined(each) for each in zip(*dlayers, strict=True)]
        if not any(ctx.needs_input_grad[i] for i in (0, 3, 4)):  # x, and the norm's parameters
            return *(None,) * 9, *dlayer
        dy = input_gradient(douts[0], layers[0])
        for dout, layer in zip(douts[1:], layers[1:], strict=True):
            dy.add_(input_gradient(dout, layer))
        dy = unpatched(dy, ctx.patch)
        dx, dweight, dbias = _residual_norm_backward(dy, inputs, mean, rstd, weight, bias, dresidual, rows, position)
        return dx, None, None, dweight, dbias, None, None, None, None, *dlayer


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, keep: bool, weight: Tensor, bias: Tensor) -> Tensor:
        a = primitives.gelu(h)
        ctx.save_for_backward(h, weight, a if keep else None)
        return linear(a, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        h, weight, a = ctx.saved_tensors
        da = input_gradient(dout, weight)
        dh, a = primitives.gelu_backward(da, h, a)
        return dh, None, *weight_gradients(dout, a, ctx.needs_input_grad[2:])


class _NormMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Any,
        position: Any,
        weight: Any,
        bias: Any,
        eps: float,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
    ) -> Any:
        inputs = x if rows is None else x[rows]
        y, mean, rstd = primitives.layer_norm(inputs, weight, bias, eps)
        ctx.eps = eps
        ctx.save_for_backward(inputs, mean, rstd, rows, position, weight, bias, w1, b1, w2)
        return x.view_as(x), linear(primitives.gelu(linear(y, w1, b1)), w2, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dresidual: Tensor, dout: Tensor) -> Any:
        inputs, mean, rstd, rows, position, weight, bias, w1, b1, w2 = ctx.saved_tensors
        y = primitives.layer_norm_apply(inputs, mean, rstd, weight, bias, ctx.eps)
        dh, a = primitives.gelu_backward(input_gradient(dout, w2), linear(y, w1, b1), None)
        wanted = ctx.needs_input_grad[6:]
        second = weight_gradients(dout, a, wanted[2:])
        del a
        first = weight_gradients(dh, y, wanted[:2])
        dx, dweight, dbias = _residual_norm_backward(
            input_gradient(dh, w1), inputs, mean, rstd, weight, bias, dresidual, rows, position
        )
        return dx, None, None, dweight, dbias, None, *first, *second


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, rows: Any, position: Any) -> Tensor:
        ctx.save_for_backward(rows)
        return primitives.add_rows(x, f, rows, position)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return dout, (dout if rows is None else dout[rows]), None, None


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.samples = x.shape[0]
        ctx.save_for_backward(rows)
        return x[rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return dout.new_zeros(ctx.samples, *dout.shape[1:]).index_copy_(0, rows, dout), None


def _residual_norm_backward(
    dy: Tensor,
    inputs: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Any,
    bias: Any,
    dresidual: Tensor,
    rows: Any,
    position: Any,
) -> tuple[Tensor, Any, Any]:
    if rows is None:
        return primitives.layer_norm_backward(dy, inputs, mean, rstd, weight, bias, dresidual)
    dx, dweight, dbias = primitives.layer_norm_backward(dy, inputs, mean, rstd, weight, bias, None)
    return primitives.add_rows(dresidual, dx, rows, position), dweight, dbias


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(cast(tuple[Tensor, ...], parts))
