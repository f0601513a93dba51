"""Triton kernels of the depthwise convolution on NHWC maps: forward, input gradient, weight gradient.

Functions without autograd; `primitives.py` and `depthwise.py` have the plain spelling.

What bounds them. An output of a 7x7 is 49 multiply-adds for 4 bytes moved in bf16, 12 a byte, where an H200 does about
7: it runs out of instruction slots, not of bandwidth, and what counts is the share of multiply-adds among the
instructions. (A 3x3 has 2 a byte, and is bound by memory.) So:

- A program is one warp on `block` = 64 neighbouring channels: each thread has two of them for itself, and a warp's
  loads are whole lines. Nothing is shared between threads, no barrier is needed.
- It walks down a strip of `tile` pixels. A row of tile + K - 1 pixels is loaded once, a row ahead, and added to all K
  rows of outputs it belongs to, which wait in registers: 2 tile + K - 1 loads and stores for K K tile multiply-adds
  a channel. The tuple of waiting rows moves up by one each time; that costs nothing, since a multiply-add may write
  another register than it reads.
- The K K taps stay in registers, times the scale, and a row of outputs starts as the bias.
- Width and strides are compile-time constants: a pixel's offset is part of the load instruction, and most pixels are
  known to lie on the map. Per row and pixel that leaves the load and, in bf16, its conversion.

Counted in sm_90 code, 7x7 bf16, per row of a strip of 6: 692 instructions, 588 (85 %) of them multiply-adds; see
`tests/support/programs/compile_kernels.py`. The three rows above a map's first cost 12 / (7 H) of the work for nothing.

The weight gradient is the same walk, with K K sums in registers and K rows of the output's gradient waiting: those
do have to move from register to register, so `unroll` rows are taken at a time (80 % at 3). Each program sums over its
share of the samples, in a fixed order, and writes a partial result; these are added in a second step. No atomics: the
same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.ops.triton.block import multiprocessors
from pipeline.ops.triton.gnconv import launch

KERNEL_SIZES = (3, 7)
# Two channels a thread: a load of two bf16 is one instruction, converted by two; but two sets of taps and sums.
CHANNELS = 64
# Widths of a strip, best first. 7x7: 6 and 7 need all 255 registers there are, 8 spills. 3x3: memory hides the rest.
TILE_WIDTHS = {7: (6, 7, 5, 4), 3: (8, 7, 6)}
WEIGHT_TILE_WIDTHS = {7: (4, 5, 3), 3: (8, 7, 6)}
WEIGHT_WARPS = 8  # of the weight gradient's on a multiprocessor at a time, by its registers


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, *, tile: int | None = None, block: int = CHANNELS
) -> Tensor:
    """scale * (conv(x) + bias), stride 1, zeros around the map.

    Args:
        x: (B, H, W, C); may be a slice of the channels of a wider contiguous map.
        weight: (C, 1, K, K), K in {3, 7}, of any floating dtype.
        bias: (C,) or None.
        tile: pixels across a strip; None: what fits the map's width.
        block: channels of a program, a power of two from 32 on.

    Returns:
        (B, H, W, C) contiguous, in `x`'s dtype; sums in float32.

    Raises:
        ValueError: another K.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _convolve(x, weight, bias, scale, out, False, tile, block)
    return out


def depthwise_backward_input(
    dy: Tensor, weight: Tensor, scale: float, out: Tensor | None, *, tile: int | None = None, block: int = CHANNELS
) -> Tensor:
    """Gradient of `depthwise`'s input (B, H, W, C), written into `out` where given (a slice of a wider map, say).

    Raises:
        ValueError: K is not 3 or 7; `out` is no slice of the channels of a contiguous map.
    """
    if out is None:
        out = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    elif _pixel_stride(out) is None:
        raise ValueError(f"out is written in place and must be a slice of channels of a map, got {out.stride()}")
    _convolve(dy, weight, None, scale, out, True, tile, block)
    return out


def tap_by_tap(weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights (C, 1, K, K) of one shape as the kernels read them, (K * K, C) in memory: without a copy at each call."""
    stacked = torch.stack([weight.flatten(1) for weight in weights]).float()
    return [taps.t().view(weights[0].shape) for taps in stacked.transpose(1, 2).contiguous()]


def depthwise_backward_weight(
    dy: Tensor,
    x: Tensor,
    kernel_size: int,
    scale: float,
    *,
    tile: int | None = None,
    block: int = CHANNELS,
    unroll: int | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(dweight (C, 1, K, K), dbias (C,)), both float32 and contiguous, of `depthwise`.

    Args:
        dy: (B, H, W, C), the output's gradient.
        x: (B, H, W, C), the input.
        programs: about how many programs share the samples; None: as many as a GPU runs at a time, because each one
            more costs K K + 1 sums a channel to write and to add, and a second wave would be mostly empty.

    Raises:
        ValueError: K is not 3 or 7.
    """
    _check_size(kernel_size)
    (dy, dy_stride), (x, x_stride) = _with_pixels(dy), _with_pixels(x)
    batch, height, width, channels = x.shape
    taps = kernel_size * kernel_size
    tile = tile or _tile(width, WEIGHT_TILE_WIDTHS[kernel_size])
    # Rows at a time: fewer moves the more there are, but rows past the map's last are work for nothing.
    unroll = unroll or (3 if height % 3 == 0 else 2 if height % 2 == 0 else 1)
    strips, blocks = triton.cdiv(width, tile), triton.cdiv(channels, block)
    programs = programs or WEIGHT_WARPS * multiprocessors(x.device)
    samples = triton.cdiv(max(1, batch), max(1, programs // (strips * blocks)))  # of a program
    parts = strips * triton.cdiv(batch, samples)
    sums = torch.empty((parts, taps + 1, channels), dtype=torch.float32, device=x.device)
    if dy.numel():
        shape = (width, channels, x_stride, dy_stride, kernel_size, tile, block, unroll)
        counts, warps = (batch, height, samples), max(1, block // CHANNELS)
        launch(_weight_kernel, (parts, blocks), x, dy, x, sums, scale, *counts, *shape, num_warps=warps)
    total = sums.sum(0)  # (K * K + 1, C)
    return total[:taps].t().contiguous().view(channels, 1, kernel_size, kernel_size), total[taps]


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, out: Tensor, flip: bool, tile: int | None, block: int
) -> None:
    kernel_size = weight.shape[-1]
    _check_size(kernel_size)
    x, x_stride = _with_pixels(x)
    batch, height, width, channels = x.shape
    if not out.numel():
        return
    # Tap by tap, channels contiguous, so that a program's loads of its taps are whole lines.
    taps = weight.flatten(1).t()
    if taps.dtype != torch.float32 or not taps.is_contiguous():  # else `tap_by_tap` has made it so
        taps = torch.empty((kernel_size * kernel_size, channels), dtype=torch.float32, device=x.device).copy_(taps)
    tile = tile or _tile(width, TILE_WIDTHS[kernel_size])
    grid = (batch * triton.cdiv(width, tile), triton.cdiv(channels, block))
    shape = (width, channels, x_stride, _pixel_stride(out), kernel_size, tile, block, bias is not None, flip)
    extra = taps if bias is None else bias  # a pointer that is not used still has to be of some tensor
    warps = max(1, block // CHANNELS)
    launch(_convolve_kernel, grid, x, x, taps, extra, out, scale, height, *shape, num_warps=warps)


def _pixel_stride(x: Tensor) -> int | None:
    """Elements from one pixel of (B, H, W, C) to the next, if pixels are as in a contiguous map and channels adjoin."""
    _, height, width, channels = x.shape
    stride = max(x.stride(2), channels) if width > 1 else max(x.stride(1), channels) if height > 1 else x.stride(0)
    stride = max(stride, channels)
    expected = (height * width * stride, width * stride, stride, 1)
    fits = all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), expected, strict=True))
    return stride if fits else None


def _with_pixels(x: Tensor) -> tuple[Tensor, int]:
    """`x` (a copy where it has to be) and its pixel stride."""
    stride = _pixel_stride(x)
    return (x, stride) if stride is not None else (x.contiguous(), x.shape[-1])


def _check_size(kernel_size: int) -> None:
    if kernel_size not in KERNEL_SIZES:
        raise ValueError(f"kernels of {KERNEL_SIZES} only, got {kernel_size}: use torch's convolution")


def _tile(width: int, tiles: tuple[int, ...]) -> int:
    """The first of the tiles that leaves the fewest columns past the map's edge."""
    return min(tiles, key=lambda tile: -width % tile)


@triton.jit
def _load_row(at, left, inside, FIRST: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr):
    """Pixels FIRST, FIRST + 1, ... of one row, counted from `left`; 0 where they are off the map."""
    pixels: tl.tuple = ()
    for j in tl.static_range(COUNT):
        on_map = (left + (FIRST + j) >= 0) & (left + (FIRST + j) < W)
        pixels += (tl.load(at + (FIRST + j) * STRIDE, mask=on_map & inside, other=0.0),)
    return pixels


@triton.jit
def _as_float(pixels, COUNT: tl.constexpr):
    floats: tl.tuple = ()
    for i in tl.static_range(COUNT):
        floats += (pixels[i].to(tl.float32),)
    return floats


@triton.jit
def _convolve_kernel(
    x_ptr, taps_ptr, bias_ptr, out_ptr, scale, height,
    W: tl.constexpr, C: tl.constexpr, X: tl.constexpr, OUT: tl.constexpr,
    K: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr, HAS_BIAS: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    PAD: tl.constexpr = K // 2
    strips: tl.constexpr = (W + TILE - 1) // TILE
    sample = tl.program_id(0) // strips
    x0 = tl.program_id(0) % strips * TILE
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # Scalars as vectors, where masks are made of them: the interpreter spreads a number right, but not a comparison.
    left, tall = tl.full((BLOCK_C,), x0, tl.int32), tl.full((BLOCK_C,), height, tl.int32)
    taps: tl.tuple = ()
    for i in tl.static_range(K * K):
        at = taps_ptr + ((K * K - 1 - i) if FLIP else i) * C + c
        taps += (tl.load(at, mask=c < C, other=0.0) * scale,)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32) * scale
    # Rows of outputs that wait for more: at input row y those of y - PAD, ..., y + PAD - 1.
    waiting: tl.tuple = ()
    for _ in tl.static_range((K - 1) * TILE):
        waiting += (bias,)
    x_at = x_ptr + (sample.to(tl.int64) * height * W + x0) * X + c
    out_at = out_ptr + ((sample.to(tl.int64) * height - PAD) * W + x0) * OUT + c
    coming = _load_row(x_at, left, c < C, -PAD, TILE + K - 1, X, W)
    for y in range(height):
        # The next row is on its way while this one is worked on: two warps a scheduler do not hide it for each other.
        pixels = _as_float(coming, TILE + K - 1)
        x_at += W * X
        coming = _load_row(x_at, left, (c < C) & (y + 1 < tall), -PAD, TILE + K - 1, X, W)
        still: tl.tuple = ()
        for row in tl.static_range(K):
            for i in tl.static_range(TILE):
                total = waiting[row * TILE + i] if row < K - 1 else bias
                for k in tl.static_range(K):
                    total = tl.fma(taps[(K - 1 - row) * K + k], pixels[i + k], total)
                if row == 0:  # this was its last row
                    inside = (y >= PAD) & (left + i < W) & (c < C)
                    tl.store(out_at + i * OUT, total.to(out_ptr.dtype.element_ty), mask=inside)
                else:
                    still += (total,)
        waiting = still
        out_at += W * OUT
    for row in tl.static_range(PAD):
        for i in tl.static_range(TILE):
            inside = (tall + (row - PAD) >= 0) & (left + i < W) & (c < C)
            tl.store(out_at + i * OUT, waiting[row * TILE + i].to(out_ptr.dtype.element_ty), mask=inside)
        out_at += W * OUT


@triton.jit(do_not_specialize=["batch", "samples"])  # drop path changes them from step to step
def _weight_kernel(
    dy_ptr, x_ptr, sums_ptr, scale, batch, height, samples,
    W: tl.constexpr, C: tl.constexpr, X: tl.constexpr, DY: tl.constexpr,
    K: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    PAD: tl.constexpr = K // 2
    strips: tl.constexpr = (W + TILE - 1) // TILE
    part = tl.program_id(0)
    x0 = part % strips * TILE
    first = part // strips * samples
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    left, tall = tl.full((BLOCK_C,), x0, tl.int32), tl.full((BLOCK_C,), height, tl.int32)
    zero = tl.zeros((BLOCK_C,), tl.float32)
    sums: tl.tuple = ()
    for _ in tl.static_range(K * K):
        sums += (zero,)
    level = zero
    x_at = x_ptr + (first.to(tl.int64) * height * W + x0) * X + c
    dy_at = dy_ptr + (first.to(tl.int64) * height * W + x0) * DY + c
    for _sample in range(first, tl.minimum(first + samples, batch)):
        # At input row y the gradients of outputs in rows y - PAD, ..., y + PAD - 1; the next is loaded then.
        slopes: tl.tuple = ()
        for _ in tl.static_range(PAD * TILE):
            slopes += (zero,)
        for row in tl.static_range(PAD):
            early = _load_row(dy_at + row * W * DY, left, (c < C) & (row < tall), 0, TILE, DY, W)
            slopes += _as_float(early, TILE)
        for i in tl.static_range(PAD * TILE):
            level += slopes[PAD * TILE + i]
        x_row, dy_row = x_at, dy_at + PAD * W * DY
        for y in range(0, height, UNROLL):
            for u in tl.static_range(UNROLL):
                newest = _as_float(_load_row(dy_row, left, (c < C) & (y + u + PAD < tall), 0, TILE, DY, W), TILE)
                for i in tl.static_range(TILE):
                    level += newest[i]
                slopes += newest
                loaded = _load_row(x_row, left, (c < C) & (y + u < tall), -PAD, TILE + K - 1, X, W)
                pixels = _as_float(loaded, TILE + K - 1)
                more: tl.tuple = ()
                for ky in tl.static_range(K):
                    for kx in tl.static_range(K):
                        total = sums[ky * K + kx]
                        for i in tl.static_range(TILE):
                            total = tl.fma(slopes[(K - 1 - ky) * TILE + i], pixels[i + kx], total)
                        more += (total,)
                sums = more
                slopes = slopes[TILE:]
                x_row += W * X
                dy_row += W * DY
        x_at += height * W * X
        dy_at += height * W * DY
    sums_at = sums_ptr + part.to(tl.int64) * ((K * K + 1) * C) + c
    for i in tl.static_range(K * K):
        tl.store(sums_at + i * C, sums[i] * scale, mask=c < C)
    tl.store(sums_at + K * K * C, level * scale, mask=c < C)
