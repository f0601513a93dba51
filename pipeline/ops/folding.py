"""Parameters as the products of a stage use them: in the dtype of the maps, with their neighbours folded in.

A layer scale, and drop path's factor, go into the rows of the weight before them, which saves a pass over the map; the
affine part of a LayerNorm goes into the columns of the weight behind it, for 16-bit maps, which saves the norm its two
sums over the map in the backward pass. Either is exact up to rounding, and what is folded is rounded once.

All layers of one shape are done together, in the same few operations for one as for twenty, forward and backward, where
each layer by itself would take some of its own (tests/bench/bench_launches.py). Gradients arrive in the dtype of the
maps and leave in that of the parameters. Nothing is kept for the backward pass but the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops import kernels
from pipeline.ops.layers import Norm

Layer = tuple[Tensor, Tensor]  # weight (out, in) and bias (out,) of a linear layer


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """All `tensors`, of any shapes, in `dtype`."""
    if all(tensor.dtype == dtype for tensor in tensors):  # of none as well
        return list(tensors)
    return list(_Cast.apply(dtype, *tensors))


def copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The values of `tensors` in `dtype`, without gradient; the tensors' own where they have it."""
    with torch.no_grad():
        return [tensor.detach() for tensor in cast(tensors, dtype)]


def times(tensors: Sequence[Tensor], factor: float) -> list[Tensor]:
    """All `tensors`, of any shapes, times `factor`."""
    return list(tensors) if factor == 1 or not tensors else list(_Times.apply(factor, *tensors))


def fold_rows(
    layers: Sequence[Layer], scales: Sequence[Tensor], factors: Sequence[float], dtype: torch.dtype
) -> list[Layer]:
    """Each layer's output times `scale` (out,) times `factor`. All layers of one shape."""
    found = _FoldRows.apply(dtype, tuple(factors), *_flat(layers), *scales)
    return list(zip(found[::2], found[1::2], strict=True))


def fold_norms(layers: Sequence[Layer], affine: Sequence[Layer], dtype: torch.dtype) -> list[Layer]:
    """Each layer behind an affine map `weight * x + bias`, (in,) both, of its input. All layers of one shape."""
    found = _FoldNorms.apply(dtype, *_flat(layers), *_flat(affine))
    return list(zip(found[::2], found[1::2], strict=True))


def cast_layers(layers: Sequence[Layer], dtype: torch.dtype) -> list[Layer]:
    """`cast` of weights and biases."""
    flat = cast([part for layer in layers for part in layer], dtype)
    return list(zip(flat[::2], flat[1::2], strict=True))


def fold_into(norms: Sequence[Norm], layers: Sequence[Layer], x: Tensor) -> tuple[list[Norm], list[Layer]]:
    """(`norms`, the `layers` behind them) for maps like `x`: in its dtype, and in 16 bits without affine parameters."""
    if x.element_size() > 2 or any(norm.weight is None or norm.bias is None for norm in norms):
        return list(norms), cast_layers(layers, x.dtype)
    affine = [(norm.weight, norm.bias) for norm in norms]
    return [Norm(None, None, norm.eps) for norm in norms], fold_norms(layers, affine, x.dtype)  # type: ignore[arg-type]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """torch.stack, whose gradients are contiguous, as parameters want theirs, by one copy for all."""
    return torch.stack(tuple(tensors)) if kernels.exported() else _Stack.apply(*tensors)


def _flat(layers: Sequence[Layer]) -> list[Tensor]:
    return [weight for weight, _ in layers] + [bias for _, bias in layers]


def _chunks(tensors: Sequence[Any], count: int) -> list[Sequence[Any]]:
    return [tensors[i * count : (i + 1) * count] for i in range(len(tensors) // count)]


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """Of parameters in several dtypes (the frozen blocks of a net in bf16, say) the one that rounds none of them."""
    return max(tensors, key=Tensor.element_size).dtype


def _like(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in `dtype`, by one operation."""
    made = [tensor.new_empty(tensor.shape, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(made, list(tensors))
    return made


def _stacked(weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(n, out, in) and (n, out), by one operation, whatever dtype they come in."""
    made = [like[0].new_empty(len(like), *like[0].shape, dtype=dtype) for like in (weights, biases)]
    torch._foreach_copy_([part for each in made for part in each.unbind()], [*weights, *biases])
    return made[0], made[1]


def _layers(weights: Tensor, biases: Tensor) -> tuple[Tensor, ...]:
    """weight, bias, weight, bias, ..."""
    return tuple(part for layer in zip(weights.unbind(), biases.unbind(), strict=True) for part in layer)


def _let_frozen_be(ctx: Any, first: int, count: int, made: tuple[Tensor, ...]) -> None:
    """Layers none of whose parameters wants a gradient ask for none, so that nobody computes it.

    first: where parameters begin among what the Function was given.
    """
    wanted = ctx.needs_input_grad[first:]
    frozen = [not any(wanted[i::count]) for i in range(count)]
    ctx.mark_non_differentiable(*(part for i, part in enumerate(made) if frozen[i // 2]))


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> Any:
        ctx.dtype = _widest(tensors)
        made = _like(tensors, dtype)
        ctx.mark_non_differentiable(
            *(each for each, wanted in zip(made, ctx.needs_input_grad[1:], strict=True) if not wanted)
        )
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *_like(grads, ctx.dtype)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.contiguous().unbind()


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: float, *tensors: Tensor) -> Any:
        ctx.factor = factor
        return tuple(torch._foreach_mul(list(tensors), factor))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *torch._foreach_mul(list(grads), ctx.factor)


class _FoldRows(torch.autograd.Function):
    """V = s W and c = s b, with s = scale x factor of each row."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, factors: tuple[float, ...], *parameters: Tensor) -> Any:
        weights, biases, scales = _chunks(parameters, len(factors))
        ctx.factors = factors
        ctx.save_for_backward(*parameters)
        weight, bias = _stacked(weights, biases, _widest(weights))
        scale = _FoldRows._scale(scales, factors)
        made = _layers((weight * scale[..., None]).to(dtype), (bias * scale).to(dtype))
        _let_frozen_be(ctx, 2, len(factors), made)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weights, biases, scales = _chunks(ctx.saved_tensors, len(ctx.factors))
        weight, bias = _stacked(weights, biases, _widest(weights))
        scale = _FoldRows._scale(scales, ctx.factors)
        dweight, dbias = _stacked(grads[::2], grads[1::2], weight.dtype)
        dscale = torch.linalg.vecdot(dweight, weight).add_(bias.mul_(dbias))
        dscales = torch._foreach_mul(list(dscale.unbind()), list(ctx.factors))
        found = [*dweight.mul_(scale[..., None]).unbind(), *dbias.mul_(scale).unbind(), *dscales]
        return None, None, *(each if want else None for each, want in zip(found, ctx.needs_input_grad[2:], strict=True))

    @staticmethod
    def _scale(scales: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
        made = scales[0].new_empty(len(scales), *scales[0].shape, dtype=_widest(scales))
        torch._foreach_copy_(list(made.unbind()), list(scales))
        torch._foreach_mul_(list(made.unbind()), list(factors))
        return made


class _FoldNorms(torch.autograd.Function):
    """V = W diag(a) and c = b + W d, of the affine map a x + d in front."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parameters: Tensor) -> Any:
        ctx.count = len(parameters) // 4
        ctx.save_for_backward(*parameters)
        weight, bias, slope, shift = _FoldNorms._stacks(parameters, ctx.count)
        bias += (weight * shift[:, None]).sum(-1)  # no product: those of float32 may be rounded to tf32
        made = _layers(weight.mul_(slope[:, None]).to(dtype), bias.to(dtype))
        _let_frozen_be(ctx, 1, ctx.count, made)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, _, slope, shift = _FoldNorms._stacks(ctx.saved_tensors, ctx.count)
        dweight, dbias = _stacked(grads[::2], grads[1::2], weight.dtype)
        dshift = (weight * dbias[..., None]).sum(1)
        dslope = weight.mul_(dweight).sum(1)
        dweight.mul_(slope[:, None]).addcmul_(dbias[..., None], shift[:, None])
        found = [part for each in (dweight, dbias, dslope, dshift) for part in each.unbind()]
        return None, *(each if want else None for each, want in zip(found, ctx.needs_input_grad[1:], strict=True))

    @staticmethod
    def _stacks(parameters: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights, biases, slopes, shifts = _chunks(parameters, count)
        dtype = _widest(weights)
        return *_stacked(weights, biases, dtype), *_stacked(slopes, shifts, dtype)
