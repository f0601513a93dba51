"""Triton kernels of recursive gating: products of channel slices, and the narrow 1x1 convolutions joined to them.

Functions without autograd; `primitives.py` has the plain spelling of each. "Row-strided" is a matrix whose rows are
contiguous, at any distance: a slice of the channels of a wider NHWC tensor.

- `multiply`, `multiply_backward`: bound by memory (2 reads and 1 write, 3 reads and 3 writes an element). Programs take
  consecutive elements across rows, so that no lane is idle whatever the width; 8 bf16 elements a thread are one
  access of 16 bytes in each tensor.
- `gated_linear`: a row of K + 3 D numbers moves for K D multiply-adds. At K, D <= 192 in bf16 that is at most 24
  multiply-adds a byte, where an H200 turns from memory to tensor cores at about 100; so the product of a step and
  the gating after it are one pass, and p and the product are written from registers.

Widths and strides are compile-time constants (a few per model): they decide the width of memory accesses.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements a program: 16 a thread of 4 warps, so two accesses of 16 bytes in flight per bf16 tensor
# Products and sums round as written, in every kernel alike: what backward recomputes has the forward pass's bits.
OPTIONS = {"enable_fp_fusion": False}


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any) -> None:
    """`kernel` on the GPU of `like` and its current stream. Triton alone takes the current GPU, wherever the data is.

    Does not wait. Only axis 0 of a grid reaches beyond 65535: what grows with the batch goes there.
    """
    if like.is_cuda:
        with torch.cuda.device_of(like):
            kernel[grid](*args, **options, **OPTIONS)
    else:  # the interpreter, and what takes note of launches
        kernel[grid](*args, **options, **OPTIONS)


def multiply(a: Tensor, b: Tensor, *, block: int = BLOCK) -> Tensor:
    """a * b of two row-strided (N, D) tensors -> (N, D) contiguous, in `a`'s dtype."""
    a, b = with_rows(a), with_rows(b)
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    n, width = a.shape
    if out.numel():
        grid = (triton.cdiv(n * width, block),)
        launch(_multiply_kernel, grid, a, a, b, out, n, width, a.stride(0), b.stride(0), block, num_warps=4)
    return out


def multiply_backward(dx: Tensor, a: Tensor, b: Tensor, da: Tensor, db: Tensor, *, block: int = BLOCK) -> Tensor:
    """Writes da = dx * b and db = dx * a into the row-strided views given; returns a * b, contiguous.

    All are (N, D). The product is recomputed here because the weight gradient of the next 1x1 convolution needs it.

    Raises:
        ValueError: a row of `da` or `db` is not contiguous, or overlaps the next.
    """
    dx, a, b = with_rows(dx), with_rows(a), with_rows(b)
    check_rows(da, "da")
    check_rows(db, "db")
    x = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    n, width = a.shape
    if x.numel():
        grid = (triton.cdiv(n * width, block),)
        strides = (dx.stride(0), a.stride(0), b.stride(0), da.stride(0), db.stride(0))
        launch(_multiply_backward_kernel, grid, x, dx, a, b, da, db, x, n, width, *strides, block, num_warps=4)
    return x


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor, c: Tensor, *, block_rows: int = 128, num_warps: int = 4
) -> tuple[Tensor, Tensor]:
    """(p = x @ weight.T + bias, p * c) in one pass, both (N, D) contiguous and in `x`'s dtype.

    Args:
        x: (N, K), row-strided.
        weight: (D, K), in any floating dtype: used in that of `x`.
        bias: (D,).
        c: (N, D), row-strided.

    The second output is made of `p` as it is stored, so that `multiply(p, c)` gives it again to the last bit.

    Pays for 16-bit types: float32 is multiplied as such, without tensor cores, and bound by that; whether to call it
    there is the caller's choice.
    """
    x, c, weight = with_rows(x), with_rows(c), weight.to(x.dtype).contiguous()
    (n, k), d = x.shape, weight.shape[0]
    p, product = (torch.empty((n, d), dtype=x.dtype, device=x.device) for _ in range(2))
    if p.numel():
        # 64 columns: 64 sums a thread. A wider D takes several blocks of columns, each of which reads its rows of x:
        # they are next to each other in the grid and run at the same time, so all readings but one come from L2.
        block_d = min(64, max(16, triton.next_power_of_2(d)))
        # The largest power of two that divides K: no lane of the tensor cores is wasted on padding (96 = 3 x 32).
        block_k = min(64, max(16, k & -k))
        grid = (triton.cdiv(n, block_rows) * triton.cdiv(d, block_d),)
        interpreted = not isinstance(_gated_linear_kernel, triton.JITFunction)
        shape = (k, d, x.stride(0), c.stride(0), block_rows, block_d, block_k, interpreted)
        tensors = (x, weight, bias, c, p, product)
        launch(_gated_linear_kernel, grid, x, *tensors, n, *shape, num_warps=num_warps, num_stages=3)
    return p, product


def with_rows(x: Tensor) -> Tensor:
    """`x` itself where its rows are contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_rows(view: Tensor, name: str) -> None:
    """Raises ValueError if `view` (N, D) cannot be written row by row: gaps in a row, or rows that overlap."""
    n, width = view.shape
    if (width > 1 and view.stride(1) != 1) or (n > 1 and view.stride(0) < width):
        raise ValueError(f"{name} is written in place and needs contiguous rows, got strides {view.stride()}")


@triton.jit
def positions(block, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The first row of a block of elements (64 bits), and of each element the row after that one and the column."""
    start = block.to(tl.int64) * BLOCK
    flat = (start % WIDTH).to(tl.int32) + tl.arange(0, BLOCK)
    return start // WIDTH, flat // WIDTH, flat % WIDTH


@triton.jit
def _multiply_kernel(
    a_ptr, b_ptr, out_ptr, n, WIDTH: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr
):
    first, row, column = positions(tl.program_id(0), WIDTH, BLOCK)
    inside = row < (n - first).to(tl.int32)
    a = tl.load(a_ptr + first * A + (row * A + column), mask=inside).to(tl.float32)
    b = tl.load(b_ptr + first * B + (row * B + column), mask=inside).to(tl.float32)
    to = out_ptr + first * WIDTH + (row * WIDTH + column)
    tl.store(to, (a * b).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _multiply_backward_kernel(
    dx_ptr, a_ptr, b_ptr, da_ptr, db_ptr, x_ptr, n,
    WIDTH: tl.constexpr, DX: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first, row, column = positions(tl.program_id(0), WIDTH, BLOCK)
    inside = row < (n - first).to(tl.int32)
    dx = tl.load(dx_ptr + first * DX + (row * DX + column), mask=inside).to(tl.float32)
    a = tl.load(a_ptr + first * A + (row * A + column), mask=inside).to(tl.float32)
    b = tl.load(b_ptr + first * B + (row * B + column), mask=inside).to(tl.float32)
    tl.store(da_ptr + first * DA + (row * DA + column), (dx * b).to(da_ptr.dtype.element_ty), mask=inside)
    tl.store(db_ptr + first * DB + (row * DB + column), (dx * a).to(db_ptr.dtype.element_ty), mask=inside)
    to = x_ptr + first * WIDTH + (row * WIDTH + column)
    tl.store(to, (a * b).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])  # as in LayerNorm
def _gated_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, c_ptr, p_ptr, product_ptr, n,
    K: tl.constexpr, D: tl.constexpr, X: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    column_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    first = (tl.program_id(0) // column_blocks).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    inside = (row < n - first)[:, None]
    d = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32) + bias[None, :]
    for k0 in range(0, K, BLOCK_K):
        x_at = x_ptr + first * X + (row[:, None] * X + (k0 + k)[None, :])
        x = tl.load(x_at, mask=inside & (k0 + k < K)[None, :], other=0.0)
        weight_at = weight_ptr + (d[None, :] * K + (k0 + k)[:, None])
        weight = tl.load(weight_at, mask=(d < D)[None, :] & (k0 + k < K)[:, None], other=0.0)
        if WIDEN:  # the interpreter keeps bf16 as its bits, which numpy multiplies as integers
            acc = tl.dot(x.to(tl.float32), weight.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, weight, acc, input_precision="ieee")
    p = acc.to(p_ptr.dtype.element_ty)
    inside = inside & (d < D)[None, :]
    to = first * D + (row[:, None] * D + d[None, :])
    tl.store(p_ptr + to, p, mask=inside)
    c = tl.load(c_ptr + first * C + (row[:, None] * C + d[None, :]), mask=inside, other=0.0)
    product = p.to(tl.float32) * c.to(tl.float32)
    tl.store(product_ptr + to, product.to(product_ptr.dtype.element_ty), mask=inside)
