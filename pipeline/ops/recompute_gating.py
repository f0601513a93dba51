"""The recursive gating and the linear layer behind it as one autograd Function: see `recompute.py`, whose words hold.

It keeps the gate, the context and the steps' matrix products; norm and gating products are done again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops import kernels, primitives
from pipeline.ops.layers import Norm
from pipeline.ops.products import input_gradient, linear, weight_gradients


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
