"""The block's operations without autograd: one readable spelling in plain PyTorch, and the Triton one where it works.

What `recompute.py` and its neighbours put together into differentiable operators. Activations are NHWC in one dtype;
statistics and the gradients of affine parameters are float32 (float64 in a float64 model).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import kernels, products

NARROW = 192  # channels: a product of this width or less is bound by memory, and worth joining to what follows it


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension: (y, mean, rstd), the statistics one number a row."""
    if kernels.usable(x):
        from pipeline.ops.triton import block as block_triton

        y, mean, rstd = block_triton.layer_norm(_rows(x), weight, bias, eps)
        return y.view(x.shape), mean, rstd
    if weight is None and x.element_size() == 2 and x.device.type == "cpu":
        weight, bias = _identity(x)
    mixed = weight is not None and weight.dtype != x.dtype
    # CUDA takes one dtype alone; a CPU keeps the statistics in float32 where the parameters are.
    if x.element_size() == 2 and mixed == x.is_cuda:
        wide = products.sum_dtype(x.dtype)
        weight, bias = (None if each is None else each.to(wide) for each in (weight, bias))
        y, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
        return y.to(x.dtype), mean, rstd
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm_apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The `y` of `layer_norm` once more, for the backward pass."""
    if kernels.usable(x):
        from pipeline.ops.triton import block as block_triton

        return block_triton.layer_norm_apply(_rows(x), mean, rstd, weight, bias).view(x.shape)
    # One fused pass over x: cheaper than applying the saved statistics in several.
    return layer_norm(x, weight, bias, eps)[0]


def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, add: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx + add, dweight, dbias). `add` is the gradient that came along the residual, if any."""
    if kernels.usable(x):
        from pipeline.ops.triton import block as block_triton

        flat = None if add is None else _rows(add)
        dx, dweight, dbias = block_triton.layer_norm_backward(_rows(dy), _rows(x), mean, rstd, weight, flat)
        return dx.view(x.shape), dweight, dbias
    dtype, affine = x.dtype, weight is not None
    if not affine and x.element_size() == 2 and x.device.type == "cpu":
        weight, bias = _identity(x)
    elif x.element_size() == 2 and (not x.is_cuda or (weight is not None and weight.dtype != dtype)):
        # In bf16 a CPU (torch 2.15) sums the parameters' gradients in bf16: 5 to 50 % off. CUDA takes one dtype alone.
        wide = products.sum_dtype(dtype)
        dy, x = dy.to(wide), x.to(wide)
        weight, bias = (None if each is None else each.to(wide) for each in (weight, bias))
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy, x, x.shape[-1:], mean, rstd, weight, bias, [True, affine, affine]
    )
    dx = dx.to(dtype)
    return (dx if add is None else dx + add), (dweight if affine else None), (dbias if affine else None)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a * b, of slices of wider tensors as well: (..., D) each -> (..., D) contiguous."""
    if kernels.usable(a):
        from pipeline.ops.triton import gnconv as gnconv_triton

        return gnconv_triton.multiply(_rows(a), _rows(b)).view(a.shape)
    return (a * b).contiguous()


def multiply_backward(dx: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> Tensor:
    """Write the gradients of a * b into `da` and `db` (views that may be slices), and return a * b once more."""
    if kernels.usable(dx):
        from pipeline.ops.triton import gnconv as gnconv_triton

        written = (each.view(-1, each.shape[-1]) for each in (da, db))  # raises where it would have to copy
        return gnconv_triton.multiply_backward(_rows(dx), _rows(a), _rows(b), *written).view(dx.shape)
    if torch.compiler.is_compiling():  # it takes no slice as `out`, and needs none
        da.copy_(dx * b)
        db.copy_(dx * a)
    else:
        torch.mul(dx, b, out=da)
        torch.mul(dx, a, out=db)
    return (a * b).contiguous()


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the recursion: (p = x W^T + b, p * c), both (..., out). `c` may be a slice."""
    if x.element_size() == 2 and max(weight.shape) <= NARROW and kernels.usable(x):  # fp32: no tensor cores
        from pipeline.ops.triton import gnconv as gnconv_triton

        p, product = gnconv_triton.gated_linear(_rows(x), weight, bias, _rows(c))
        return p.view(c.shape), product.view(c.shape)
    p = products.linear(x, weight, bias)
    return p, multiply(p, c)


def gelu(h: Tensor) -> Tensor:
    """GELU by the error function."""
    if kernels.usable(h):
        from pipeline.ops.triton import block as block_triton

        return block_triton.gelu(_rows(h)).view(h.shape)
    return F.gelu(h)


def gelu_backward(da: Tensor, h: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dh, a = gelu(h)): the gradient, and the activation, once more if need be, for the weight gradient behind it."""
    if kernels.usable(h):
        from pipeline.ops.triton import block as block_triton

        dh, again = block_triton.gelu_backward(_rows(da), _rows(h))
        return dh.view(h.shape), again.view(h.shape)
    return torch.ops.aten.gelu_backward(da, h), F.gelu(h) if a is None else a


def add_rows(x: Tensor, f: Tensor, rows: Tensor | None, position: Tensor | None = None) -> Tensor:
    """`x` plus `f` at the samples `rows` (int64, ascending) of the batch, the others as they are; None: at all.

    position: (B,), where in `rows` each sample is, or -1; made here where it is not given.
    """
    if kernels.usable(x):
        from pipeline.ops.triton import block as block_triton

        if rows is not None and position is None:
            position = torch.full((len(x),), -1, device=x.device)
            position[rows] = torch.arange(len(rows), device=x.device)
        flat = block_triton.residual(x.flatten(1, -2), f.flatten(1, -2), position, None, 1.0)
        return flat.view(x.shape)
    return x + f if rows is None else torch.index_add(x, 0, rows, f)


def widened_product(a: Tensor, b: Tensor, normed: bool) -> Tensor:
    """a * b: the gradient of a context, in float32 where a norm's backward pass would make it so (`normed`)."""
    return torch.mul(a, b, out=_widened(a, a.shape)) if normed and _sums_wide(a) else a * b


def widened_pair(a: Tensor, b: Tensor) -> Tensor:
    """(a, b) side by side along the channels: the gradient of a norm's output, in float32 where it is next."""
    shape = (*a.shape[:-1], a.shape[-1] + b.shape[-1])
    return torch.cat((a, b), -1, out=_widened(a, shape)) if _sums_wide(a) else torch.cat((a, b), -1)


def _sums_wide(x: Tensor) -> bool:
    """Whether `layer_norm_backward` of an affine norm goes through float32: see there."""
    return x.element_size() == 2 and not x.is_cuda and not kernels.usable(x) and not torch.compiler.is_compiling()


def _widened(like: Tensor, shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=products.sum_dtype(like.dtype))


def _identity(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift that change nothing: with them a CPU keeps a norm's statistics in float32, without in bf16."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:  # what is traced, or fake, must not stay
        return x.new_ones(x.shape[-1], dtype=torch.float32), x.new_zeros(x.shape[-1], dtype=torch.float32)
    return _kept_identity(x.shape[-1])


@cache
def _kept_identity(channels: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        return torch.ones(channels, device="cpu"), torch.zeros(channels, device="cpu")


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)
