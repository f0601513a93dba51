"""Triton kernels of the residual block around its matrix products: LayerNorm, GELU, the residual. All bound by memory.

Functions without autograd; `primitives.py` has the plain spelling of each. Computed in float32, whatever the dtype.

- LayerNorm: a row is read once and stays in registers, padded to a power of two (192 and 768 channels leave a quarter
  of the lanes idle; it still hides behind memory). Forward: 1 read and 1 write an element; backward: 2 reads, 1 more
  for the residual's gradient that is added in the same pass, 1 write.
- Gradients of affine parameters: each program sums a fixed share of the rows in registers and writes one partial
  row; the partial rows are added in a second step. No atomics: the same inputs give the same bits.
- GELU: 1 read and 1 write an element; backward 2 and 2. The error function is Abramowitz and Stegun's 7.1.26, off
  by 1.5e-7 at most, where float32's `1 + erf` loses 0.6e-7: 19 instructions an element in all against 36 with
  libdevice's, and the derivative shares its exponential. An H200 has slots for 24 while 4 bytes come and go.
- The residual: 2 reads and 1 write; a sample that drop path left out has no second read.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.ops.triton.gnconv import BLOCK, launch, positions, with_rows

NORM_WARPS = 16  # of LayerNorm's forward pass on a multiprocessor at a time
ROW_TILE = 2048  # elements a program of its backward pass holds: 16 a thread of 4 warps, in up to 6 tensors
ROWS_PER_PROGRAM = 8  # of LayerNorm's backward pass, at least: partial sums stay below a tenth of the traffic


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 for the CPU, where only the interpreter runs and programs take turns."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension.

    Args:
        x: (N, C), row-strided.
        weight, bias: (C,), both None for no affine part.

    Returns:
        (y (N, C) contiguous in `x`'s dtype, mean (N,) float32, rstd (N,) float32)
    """
    x = with_rows(x)
    n = x.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(n, dtype=torch.float32, device=x.device) for _ in range(2))
    if y.numel():
        _layer_norm(x, weight, bias, y, mean, rstd, eps, known=False)
    return y, mean, rstd


def layer_norm_apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`y` of `layer_norm` again, from its statistics, to the last bit."""
    x = with_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        _layer_norm(x, weight, bias, y, mean, rstd, 0.0, known=True)
    return y


def _layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    known: bool,
) -> None:
    n, c = x.shape
    # A warp for 1024 columns: 32 numbers a thread, and up to there no sum crosses warps. Each walks over many rows, or
    # reading the affine part for every row would be twice the traffic of the row.
    block = triton.next_power_of_2(c)
    rows, warps = max(1, 1024 // block), max(1, block // 1024)
    programs = min(triton.cdiv(n, rows), NORM_WARPS * multiprocessors(x.device) // warps)
    # Pointers that are not used still have to be of some tensor.
    affine = (mean, mean) if weight is None else (weight, bias)
    shape = (n, eps, c, x.stride(0), rows, block, weight is not None, bias is not None, known)
    launch(_layer_norm_kernel, (max(1, programs),), x, x, *affine, y, mean, rstd, *shape, num_warps=warps)


def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, add: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `layer_norm`.

    Args:
        dy, x: (N, C), row-strided.
        add: (N, C) or None, what to add to the gradient: that of the residual around the norm.

    Returns:
        (dx + add (N, C) contiguous in `x`'s dtype, dweight (C,) float32, dbias (C,) float32); the last two None if
        `weight` is.
    """
    dy, x = with_rows(dy), with_rows(x)
    add = None if add is None else with_rows(add)
    n, c = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(c)
    rows, warps = max(1, ROW_TILE // block), max(4, block // (ROW_TILE // 4))
    programs = max(1, min(4 * multiprocessors(x.device), n // max(rows, ROWS_PER_PROGRAM)))
    partial = torch.zeros if n == 0 else torch.empty
    sums = partial((programs, 2, c) if weight is not None else (0,), dtype=torch.float32, device=x.device)
    if dx.numel():
        extra = dy if add is None else add
        strides = (dy.stride(0), x.stride(0), extra.stride(0))
        shape = (c, *strides, rows, block, weight is not None, add is not None)
        tensors = (dy, x, mean, rstd, mean if weight is None else weight, extra, dx, sums)
        launch(_layer_norm_backward_kernel, (programs,), x, *tensors, n, *shape, num_warps=warps)
    if weight is None:
        return dx, None, None
    dweight, dbias = sums.sum(0)
    return dx, dweight, dbias


def gelu(h: Tensor, *, block: int = BLOCK) -> Tensor:
    """GELU of the error function, elementwise; contiguous."""
    h = h.contiguous()
    out = torch.empty_like(h)
    if h.numel():
        launch(_gelu_kernel, (triton.cdiv(h.numel(), block),), h, h, out, h.numel(), block, num_warps=4)
    return out


def gelu_backward(da: Tensor, h: Tensor, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """(gradient of `h`, gelu(h)) from the gradient of the activation: the second for the next weight gradient."""
    da, h = da.contiguous(), h.contiguous()
    dh, a = torch.empty_like(h), torch.empty_like(h)
    if h.numel():
        grid = (triton.cdiv(h.numel(), block),)
        launch(_gelu_backward_kernel, grid, h, da, h, dh, a, h.numel(), block, num_warps=4)
    return dh, a


def residual(
    x: Tensor, f: Tensor, position: Tensor | None, gamma: Tensor | None, scale: float, *, block: int = BLOCK
) -> Tensor:
    """x + scale * gamma * f where a sample was kept, x elsewhere.

    Args:
        x: (B, M, C).
        f: (B', M, C), of any floating dtype, the samples that were kept.
        position: (B,) int64 or int32, the row of `f` for each sample or -1; None: all were kept, in order.
        gamma: (C,) or None for 1.

    Returns:
        (B, M, C) contiguous, in `x`'s dtype.
    """
    x, f = x.contiguous(), f.contiguous()
    out = torch.empty_like(x)
    batch, m, c = x.shape
    if out.numel():
        blocks = triton.cdiv(m * c, block)  # of a sample
        pointers = (x, f, x if position is None else position, x if gamma is None else gamma, out)
        shape = (c, block, position is not None, gamma is not None)
        launch(_residual_kernel, (batch * blocks,), x, *pointers, scale, m, blocks, *shape, num_warps=4)
    return out


@triton.jit(do_not_specialize=["n"])  # drop path changes it, and masks of whole rows are all that it makes
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, n, eps,
    C: tl.constexpr, X: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_C)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    # Neighbouring programs take neighbouring rows, turn by turn.
    for first in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        row = tl.arange(0, ROWS).to(tl.int64) + first
        inside = (row < n)[:, None] & (column < C)[None, :]
        x = tl.load(x_ptr + (row[:, None] * X + column[None, :]), mask=inside, other=0.0).to(tl.float32)
        if KNOWN:
            mean = tl.load(mean_ptr + row, mask=row < n, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=row < n, other=0.0)
        else:  # two passes over registers: E[x^2] - E[x]^2 cancels where the mean is large
            mean = tl.sum(x, 1) / C
            centred = tl.where((column < C)[None, :], x - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
            tl.store(mean_ptr + row, mean, mask=row < n)
            tl.store(rstd_ptr + row, rstd, mask=row < n)
        y = (x - mean[:, None]) * rstd[:, None]
        if HAS_WEIGHT:
            y *= weight
        if HAS_BIAS:
            y += bias
        tl.store(y_ptr + (row[:, None] * C + column[None, :]), y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _layer_norm_backward_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, add_ptr, dx_ptr, sums_ptr, n,
    C: tl.constexpr, DY: tl.constexpr, X: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_ADD: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_C)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
        dweight = tl.zeros((ROWS, BLOCK_C), tl.float32)
        dbias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        row = tl.arange(0, ROWS).to(tl.int64) + first
        inside = (row < n)[:, None] & (column < C)[None, :]
        dy = tl.load(dy_ptr + (row[:, None] * DY + column[None, :]), mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + (row[:, None] * X + column[None, :]), mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < n, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < n, other=0.0)[:, None]
        normal = tl.where(inside, (x - mean) * rstd, 0.0)
        slope = dy
        if HAS_WEIGHT:
            slope = dy * weight
            dweight += dy * normal
            dbias += dy
        along = tl.sum(slope * normal, 1)[:, None] / C
        level = tl.sum(slope, 1)[:, None] / C
        dx = (slope - level - normal * along) * rstd
        if HAS_ADD:
            dx += tl.load(add_ptr + (row[:, None] * ADD + column[None, :]), mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + (row[:, None] * C + column[None, :]), dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if HAS_WEIGHT:
        sums_at = sums_ptr + tl.program_id(0) * (2 * C) + column
        tl.store(sums_at, tl.sum(dweight, 0), mask=column < C)
        tl.store(sums_at + C, tl.sum(dbias, 0), mask=column < C)


@triton.jit
def _normal(h):
    """(Phi(h), exp(-h^2 / 2)) of the standard normal distribution, by Abramowitz and Stegun 7.1.26."""
    bell = tl.exp2(h * h * -0.7213475204)  # log2(e) / 2
    t = tl.fma(tl.abs(h), 0.2316419, 1.0)  # 0.3275911 / sqrt(2)
    t = tl.rsqrt(t * t)  # 1 / t: two instructions, where a division's care for the ends of the range takes six
    tail = tl.fma(t, 0.5307027145, -0.7265760135)  # the published coefficients, halved
    tail = tl.fma(t, tail, 0.7107068705)
    tail = tl.fma(t, tail, -0.142248368)
    tail = tl.fma(t, tail, 0.127414796)
    tail = t * tail * bell
    return tl.where(h < 0, tail, 1.0 - tail), bell


@triton.jit
def _gelu_kernel(h_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    share, _bell = _normal(h)
    tl.store(out_ptr + at, (h * share).to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def _gelu_backward_kernel(da_ptr, h_ptr, dh_ptr, a_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    da = tl.load(da_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    share, bell = _normal(h)
    dh = da * (share + h * bell * 0.3989422804)  # the density: bell / sqrt(2 pi)
    tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=at < n)
    tl.store(a_ptr + at, (h * share).to(a_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def _residual_kernel(
    x_ptr, f_ptr, position_ptr, gamma_ptr, out_ptr, scale, m, blocks,
    C: tl.constexpr, BLOCK: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_GAMMA: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first, row, column = positions(tl.program_id(0) % blocks, C, BLOCK)
    rows = (m - first).to(tl.int32)
    at = row * C + column
    y = tl.load(x_ptr + (sample * m + first) * C + at, mask=row < rows).to(tl.float32)
    source = sample
    if HAS_POSITION:
        source = tl.load(position_ptr + sample).to(tl.int64)
    # Nothing is read for a sample that was dropped: x + 0.
    kept = row < tl.where(source >= 0, rows, 0)
    f = tl.load(f_ptr + (source * m + first) * C + at, mask=kept, other=0.0).to(tl.float32) * scale
    if HAS_GAMMA:
        f *= tl.load(gamma_ptr + column, mask=kept, other=0.0).to(tl.float32)
    tl.store(out_ptr + (sample * m + first) * C + at, (y + f).to(out_ptr.dtype.element_ty), mask=row < rows)
