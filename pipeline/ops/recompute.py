"""The block's operators as autograd Functions that keep products of matrices and convolutions, and recompute the rest.

Each joins a cheap prologue (LayerNorm, GELU, the gating product) to the linear layer behind it. Plain autograd keeps
the prologue's output for the weight gradient; these keep its input, which is there anyway, and go through the
prologue once more in the backward pass: no matrix product is done twice, and about half of the bytes are kept. With
`keep` they keep it too, as plain autograd does. Every Function equals its plain spelling in `gnconv.py` and
`models/block.py` in value and gradient (a test holds them equal).

All activations (B, H, W, C) in one dtype, contiguous; weights of linear layers (out, in) in that dtype, affine
parameters of norms in any. `rows` are the samples of the batch that drop path keeps (int64, ascending), or None for
all; `position` is for the kernels, (B,): where in `rows` each sample is, or -1.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops import kernels, primitives
from pipeline.ops.depthwise import Taps, depthwise_backward, depthwise_forward
from pipeline.ops.fourier import FourierBasis, SpectrumFilter, filter_backward, filter_forward
from pipeline.ops.layers import Norm, interleave, patches, unpatched
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


def gating(
    gate: Tensor,
    context: Tensor,
    norm: Norm | None,
    pws: list[tuple[Tensor, Tensor]],
    out: tuple[Tensor, Tensor],
    keep: bool = False,
) -> Tensor:
    """`gnconv.recursive_gating` of a context that may still have to be normalised, and the linear layer behind it.

    gate: (B, H, W, dims[0]); context: (B, H, W, sum(dims)); pws: (weight (dims[k], dims[k - 1]), bias) per further
    order; out: weight (C, dims[-1]) and bias. Returns (B, H, W, C).
    """
    flat = [tensor for layer in (*pws, out) for tensor in layer]
    return _Gating.apply(gate, context, *(norm or (None, None, 0.0)), keep, *flat)


def local_global(
    context: Tensor,
    norm: Norm,
    local: Taps,
    filt: SpectrumFilter,
    narrow_filter: SpectrumFilter,
    basis: FourierBasis,
    keep: bool = False,
) -> Tensor:
    """The global-local filter up to its last norm: (B, H, W, C) -> (B, H, W, C), the halves interleaved.

    local: of a 3x3 without bias, C / 2 channels. narrow_filter: the values of `filt` in the dtype of `context`.
    """
    asked = (local.weight, *filt)
    return _LocalGlobal.apply(context, *norm, keep, *asked, local.narrow_weight, *narrow_filter, *basis)


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


class _Gating(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, context: Tensor, weight: Any, bias: Any, eps: float, keep: bool, *layers: Tensor
    ) -> Tensor:
        mean = rstd = None
        c = context
        if weight is not None:
            c, mean, rstd = primitives.layer_norm(context, weight, bias, eps)
        weights, biases = layers[::2], layers[1::2]
        first, *rest = c.split([gate.shape[-1], *(w.shape[0] for w in weights[:-1])], -1)
        products, inputs = [], [primitives.multiply(gate, first)]
        for w, b, c_k in zip(weights[:-1], biases[:-1], rest, strict=True):
            p, x = primitives.gated_linear(inputs[-1], w, b, c_k)
            products.append(p)
            inputs.append(x)
        ctx.eps, ctx.orders, ctx.keep = eps, len(weights), keep
        kept = (c, *inputs) if keep else ()
        ctx.save_for_backward(gate, context, mean, rstd, weight, bias, *products, *weights, *kept)
        return linear(inputs[-1], weights[-1], biases[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        gate, context, mean, rstd, weight, bias, *rest = ctx.saved_tensors
        n = ctx.orders
        products, weights, c, inputs = [gate, *rest[: n - 1]], rest[n - 1 : 2 * n - 1], context, None
        if ctx.keep:
            c, *inputs = rest[2 * n - 1 :]
        elif weight is not None:
            c = primitives.layer_norm_apply(context, mean, rstd, weight, bias, ctx.eps)
        wanted = ctx.needs_input_grad[6:]
        pairs = [wanted[i : i + 2] for i in range(0, len(wanted), 2)]
        step = _gating_by_kernels if kernels.usable(dout) else _gating_by_products
        dgate, dcontext, dlayers = step(dout, products, c, inputs, weights, pairs, weight is not None)
        dweight = dbias = None
        if weight is not None:
            dcontext, dweight, dbias = primitives.layer_norm_backward(dcontext, context, mean, rstd, weight, bias, None)
        return dgate, dcontext, dweight, dbias, None, None, *dlayers


def _gating_by_kernels(
    dout: Tensor, products: list[Tensor], c: Tensor, _: Any, weights: list[Tensor], pairs: list[Any], _norm: bool
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Step by step, each a kernel that writes both gradients of a gating product and the product once more."""
    dims = [p.shape[-1] for p in products]
    dcontext, dproducts = (c.new_empty(c.shape) for _ in range(2))  # contiguous, whatever the strides of what came in
    found: list[Tensor | None] = []
    each = zip(products, *(whole.split(dims, -1) for whole in (c, dcontext, dproducts)), weights, pairs, strict=True)
    last, rows = dout, dproducts.flatten(0, -2)
    for p, c_k, dc_k, dp, w, pair in reversed(list(each)):
        x = primitives.multiply_backward(input_gradient(dout, w), p, c_k, dp, dc_k)
        found.insert(0, weight_gradients(dout, x, (pair[0], False))[0])
        dout = dp
    return dout, dcontext, _with_biases(found, rows[:, dims[0] :], last, dims[1:], pairs)


def _gating_by_products(
    dout: Tensor,
    products: list[Tensor],
    c: Tensor,
    inputs: list[Tensor] | None,
    weights: list[Tensor],
    pairs: list[Any],
    normed: bool,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """What does not hang on the step before, for all steps at once: the recomputed products, the context's gradient,
    the sums for the biases.
    """
    dims, p = [each.shape[-1] for each in products], torch.cat(products, -1)
    if inputs is None:
        inputs = list((p * c).split(dims, -1))
    douts, dxs = [dout], []
    for c_k, w in zip(reversed(c.split(dims, -1)), reversed(weights), strict=True):
        dxs.append(input_gradient(douts[-1], w))
        douts.append(dxs[-1] * c_k)
    dgate, douts = douts[-1], douts[-2::-1]
    found = [weight_gradients(each, x, (pair[0], False))[0] for each, x, pair in zip(douts, inputs, pairs, strict=True)]
    *inner, last = douts
    rows = torch.cat(inner, -1).flatten(0, -2) if inner else last.new_empty(0, 0)
    dcontext = primitives.widened_product(torch.cat(dxs[::-1], -1), p, normed)
    return dgate, dcontext, _with_biases(found, rows, last, dims[1:], pairs)


def _with_biases(
    weights: list[Tensor | None], inner: Tensor, last: Tensor, dims: list[int], pairs: list[Any]
) -> list[Tensor | None]:
    """weight, bias, weight, bias, ...: gradients of biases by one sum over the steps inside, (N, sum(dims)), and one
    over the last.
    """
    sums: list[Tensor | None] = [None] * len(pairs)
    if any(bias for _, bias in pairs):
        sums = [*(inner.sum(0).split(dims) if dims else ()), last.flatten(0, -2).sum(0)]
    return [part for w, b, pair in zip(weights, sums, pairs, strict=True) for part in (w, b if pair[1] else None)]


class _LocalGlobal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        context: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        keep: bool,
        _local: Tensor,
        _real: Tensor,
        _imaginary: Tensor,
        local: Tensor,
        real: Tensor,
        imaginary: Tensor,
        *basis: Tensor,
    ) -> Tensor:
        u, mean, rstd = primitives.layer_norm(context, weight, bias, eps)
        near, far = u.chunk(2, -1)
        near = depthwise_forward(near, local, None)
        far, spectrum = filter_forward(far, SpectrumFilter(real, imaginary), FourierBasis(*basis))
        ctx.eps = eps
        kept = u if keep else None
        ctx.save_for_backward(context, mean, rstd, weight, bias, local, real, imaginary, spectrum, kept, *basis)
        return interleave(near, far)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        context, mean, rstd, weight, bias, local, real, imaginary, spectrum, u, *basis = ctx.saved_tensors
        if u is None:
            u = primitives.layer_norm_apply(context, mean, rstd, weight, bias, ctx.eps)
        dnear, dfar = dout.unflatten(-1, (-1, 2)).movedim(-1, 0).contiguous()
        wanted = (True, ctx.needs_input_grad[5], False)
        near, dlocal, _ = depthwise_backward(dnear, u.chunk(2, -1)[0], local, wanted)
        far, dfilter = filter_backward(dfar, spectrum, SpectrumFilter(real, imaginary), FourierBasis(*basis))
        du = primitives.widened_pair(cast(Tensor, near), far)
        dcontext, dweight, dbias = primitives.layer_norm_backward(du, context, mean, rstd, weight, bias, None)
        return dcontext, dweight, dbias, None, None, dlocal, *dfilter, *(None for _ in range(3 + len(basis)))


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
