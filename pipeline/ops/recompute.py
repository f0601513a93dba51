"""The block's operators as autograd Functions that keep products of matrices and convolutions, and recompute the rest.

Each joins a cheap prologue (LayerNorm, GELU, the gating product) to the linear layer behind it. Plain autograd keeps
the prologue's output for the weight gradient; these keep its input, which is there anyway, and go through the
prologue once more in the backward pass: no matrix product is done twice, and about half of the bytes are kept. Every
Function equals its plain spelling in `gnconv.py` and `models/hornet.py` in value and gradient
(a test holds them equal).

All activations (B, H, W, C) in one dtype, contiguous; weights of linear layers (out, in) in that dtype, affine
parameters of norms in any. `rows` are the samples of the batch that drop path keeps (int64, ascending), or None for
all.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops import primitives
from pipeline.ops.depthwise import depthwise_backward, depthwise_forward
from pipeline.ops.fourier import FourierBasis, filter_backward, filter_forward
from pipeline.ops.layers import Norm, interleave, patches, unpatched
from pipeline.ops.products import input_gradient, linear, weight_gradients


def norm_linear(
    x: Tensor,
    norm: Norm,
    *layers: tuple[Tensor, Tensor],
    rows: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """LayerNorm, then linear layers side by side: (x, output of the first, ...), each (B or len(rows), H, W, out).

    The `x` that is returned is `x`: who adds a residual to it has both gradients of `x` summed in one pass.
    """
    flat = [tensor for layer in layers for tensor in layer]
    return _NormLinear.apply(x, rows, *norm, 1, *flat)


def norm_patch_linear(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor, patch: int) -> Tensor:
    """LayerNorm, then a convolution of size and stride `patch`: (B, H, W, C) -> (B, H / patch, W / patch, out).

    weight: (out, patch * patch * C), over (row, column, channel) of the patch.
    """
    return _NormLinear.apply(x, None, *norm, patch, weight, bias)[1]


def gelu_linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear layer of GELU(h)."""
    return _GeluLinear.apply(h, weight, bias)


def norm_mlp(
    x: Tensor,
    norm: Norm,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm, linear, GELU, linear: (x, output). Keeps `x` alone: the first product is done again in backward."""
    return _NormMlp.apply(x, rows, *norm, *first, *second)


def gating(
    gate: Tensor,
    context: Tensor,
    norm: Norm | None,
    pws: list[tuple[Tensor, Tensor]],
    out: tuple[Tensor, Tensor],
) -> Tensor:
    """`gnconv.recursive_gating` of a context that may still have to be normalised, and the linear layer behind it.

    gate: (B, H, W, dims[0]); context: (B, H, W, sum(dims)); pws: (weight (dims[k], dims[k - 1]), bias) per further
    order; out: weight (C, dims[-1]) and bias. Returns (B, H, W, C).
    """
    flat = [tensor for layer in (*pws, out) for tensor in layer]
    return _Gating.apply(gate, context, *(norm or (None, None, 0.0)), *flat)


def local_global(context: Tensor, norm: Norm, local: Tensor, spectrum_filter: Tensor, basis: FourierBasis) -> Tensor:
    """The global-local filter up to its last norm: (B, H, W, C) -> (B, H, W, C), the halves interleaved.

    local: (C / 2, 1, 3, 3); spectrum_filter: (2, H, W // 2 + 1, C / 2), real and imaginary part.
    """
    return _LocalGlobal.apply(context, *norm, local, spectrum_filter, *basis)


def add_rows(x: Tensor, f: Tensor, rows: Tensor | None) -> Tensor:
    """The residual: `x` plus `f` at the samples `rows`."""
    return _AddRows.apply(x, f, rows)


def take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """The samples `rows` of `x`."""
    return x if rows is None else _TakeRows.apply(x, rows)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Any, weight: Any, bias: Any, eps: float, patch: int, *layers: Tensor) -> Any:
        inputs = x if rows is None else x[rows]
        y, mean, rstd = primitives.layer_norm(inputs, weight, bias, eps)
        y = patches(y, patch)
        ctx.eps, ctx.patch = eps, patch
        ctx.save_for_backward(inputs, mean, rstd, rows, weight, bias, *layers[::2])
        return x.view_as(x), *(linear(y, w, b) for w, b in zip(layers[::2], layers[1::2], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dresidual: Tensor, *douts: Tensor) -> Any:
        inputs, mean, rstd, rows, weight, bias, *layers = ctx.saved_tensors
        wanted, y, dlayers = ctx.needs_input_grad[6:], None, []
        if any(wanted[::2]):
            y = patches(primitives.layer_norm_apply(inputs, mean, rstd, weight, bias, ctx.eps), ctx.patch)
        for i, dout in enumerate(douts):
            dlayers += weight_gradients(dout, y, wanted[2 * i : 2 * i + 2])
        if not any(ctx.needs_input_grad[i] for i in (0, 2, 3)):  # x, and the norm's parameters
            return None, None, None, None, None, None, *dlayers
        dy = input_gradient(douts[0], layers[0])
        for dout, layer in zip(douts[1:], layers[1:], strict=True):
            dy.add_(input_gradient(dout, layer))
        dy = unpatched(dy, ctx.patch)
        dx, dweight, dbias = _residual_norm_backward(dy, inputs, mean, rstd, weight, bias, dresidual, rows)
        return dx, None, dweight, dbias, None, None, *dlayers


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        return linear(primitives.gelu(h), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        h, weight = ctx.saved_tensors
        dh, a = primitives.gelu_backward(input_gradient(dout, weight), h)
        return dh, *weight_gradients(dout, a, ctx.needs_input_grad[1:])


class _NormMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Any,
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
        ctx.save_for_backward(inputs, mean, rstd, rows, weight, bias, w1, b1, w2)
        return x.view_as(x), linear(primitives.gelu(linear(y, w1, b1)), w2, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dresidual: Tensor, dout: Tensor) -> Any:
        inputs, mean, rstd, rows, weight, bias, w1, b1, w2 = ctx.saved_tensors
        y = primitives.layer_norm_apply(inputs, mean, rstd, weight, bias, ctx.eps)
        dh, a = primitives.gelu_backward(input_gradient(dout, w2), linear(y, w1, b1))
        wanted = ctx.needs_input_grad[5:]
        second = weight_gradients(dout, a, wanted[2:])
        del a
        first = weight_gradients(dh, y, wanted[:2])
        dx, dweight, dbias = _residual_norm_backward(
            input_gradient(dh, w1), inputs, mean, rstd, weight, bias, dresidual, rows
        )
        return dx, None, dweight, dbias, None, *first, *second


class _Gating(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, context: Tensor, weight: Any, bias: Any, eps: float, *layers: Tensor) -> Tensor:
        mean = rstd = None
        c = context
        if weight is not None:
            c, mean, rstd = primitives.layer_norm(context, weight, bias, eps)
        weights, biases = layers[::2], layers[1::2]
        first, *rest = c.split([gate.shape[-1], *(w.shape[0] for w in weights[:-1])], -1)
        x, kept = primitives.multiply(gate, first), []
        for w, b, c_k in zip(weights[:-1], biases[:-1], rest, strict=True):
            p, x = primitives.gated_linear(x, w, b, c_k)
            kept.append(p)
        ctx.eps, ctx.orders = eps, len(weights)
        ctx.save_for_backward(gate, context, mean, rstd, weight, bias, *kept, *weights)
        return linear(x, weights[-1], biases[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        gate, context, mean, rstd, weight, bias, *rest = ctx.saved_tensors
        kept, weights = [gate, *rest[: ctx.orders - 1]], rest[ctx.orders - 1 :]
        c = context if weight is None else primitives.layer_norm_apply(context, mean, rstd, weight, bias, ctx.eps)
        dcontext = c.new_empty(c.shape)  # contiguous, whatever the strides of what came in
        dims = [p.shape[-1] for p in kept]
        wanted = ctx.needs_input_grad[5:]
        pairs = [wanted[i : i + 2] for i in range(0, len(wanted), 2)]
        slices = zip(kept, c.split(dims, -1), dcontext.split(dims, -1), weights, pairs, strict=True)
        dlayers: list[Tensor | None] = []
        for p, c_k, dc_k, w, pair in reversed(list(slices)):
            dp = p.new_empty(p.shape)
            x = primitives.multiply_backward(input_gradient(dout, w), p, c_k, dp, dc_k)
            dlayers = weight_gradients(dout, x, pair) + dlayers
            dout = dp
        dweight = dbias = None
        if weight is not None:
            dcontext, dweight, dbias = primitives.layer_norm_backward(dcontext, context, mean, rstd, weight, bias, None)
        return dout, dcontext, dweight, dbias, None, *dlayers


class _LocalGlobal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, context: Tensor, weight: Tensor, bias: Tensor, eps: float, local: Tensor, filt: Tensor, *basis: Tensor
    ) -> Tensor:
        u, mean, rstd = primitives.layer_norm(context, weight, bias, eps)
        near, far = u.chunk(2, -1)
        near = depthwise_forward(near, local, None)
        far, spectrum = filter_forward(far, filt, FourierBasis(*basis))
        ctx.eps = eps
        ctx.save_for_backward(context, mean, rstd, weight, bias, local, filt, spectrum, *basis)
        return interleave(near, far)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        context, mean, rstd, weight, bias, local, filt, spectrum, *basis = ctx.saved_tensors
        u = primitives.layer_norm_apply(context, mean, rstd, weight, bias, ctx.eps)
        dnear, dfar = dout.unflatten(-1, (-1, 2)).unbind(-1)
        du = u.new_empty(u.shape)
        wanted = (True, ctx.needs_input_grad[4], False)
        near, dlocal, _ = depthwise_backward(dnear.contiguous(), u.chunk(2, -1)[0], local, wanted)
        far, dfilter = filter_backward(dfar.contiguous(), spectrum, filt, FourierBasis(*basis))
        halves = du.chunk(2, -1)
        halves[0].copy_(cast(Tensor, near))
        halves[1].copy_(far)
        dcontext, dweight, dbias = primitives.layer_norm_backward(du, context, mean, rstd, weight, bias, None)
        return dcontext, dweight, dbias, None, dlocal, dfilter, *(None for _ in basis)


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, rows: Any) -> Tensor:
        ctx.save_for_backward(rows)
        return primitives.add_rows(x, f, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return dout, (dout if rows is None else dout[rows]), None


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
    dy: Tensor, inputs: Tensor, mean: Tensor, rstd: Tensor, weight: Any, bias: Any, dresidual: Tensor, rows: Any
) -> tuple[Tensor, Any, Any]:
    if rows is None:
        return primitives.layer_norm_backward(dy, inputs, mean, rstd, weight, bias, dresidual)
    dx, dweight, dbias = primitives.layer_norm_backward(dy, inputs, mean, rstd, weight, bias, None)
    return primitives.add_rows(dresidual, dx, rows), dweight, dbias
