"""Image operations of RandAugment, colour jitter and random erasing, batched, with Pillow's arithmetic.

All take uint8 batches (N, 3, H, W) with one argument a sample and return the same shape; nothing here waits for the
device. They give Pillow's bytes: integers where it has integers, float32 or float64 where it has float or double, in
its order of operations. For the same bits on CPU and CUDA each product and each sum is a call of its own (none are
fused), and no float is divided by a Python number (CUDA would multiply by its reciprocal).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

# Pixels that an operation works on at once. It bounds the scratch memory, measured at 30 to 120 bytes a pixel (tables,
# blends), 230 (slide) and 370 (affine): 200 MB at most.
CHUNK_PIXELS = 1 << 19

MASK = 0xFFFFFFFF
# A 32-bit finaliser (C. Wellons' lowbias32) in int64: the second factor less 2**32, so that no product overflows.
MIX_1, MIX_2 = 0x7FEB352D, 0x846CA68B - (1 << 32)
NORMAL_BITS = 16


def in_chunks(
    images: Tensor, op: Callable[..., Tensor], index: Tensor, *arguments: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """(part of index, op(images[part], arguments of the part)); the arguments are one row a sample, as index is."""
    size = max(1, CHUNK_PIXELS // (images.shape[2] * images.shape[3]))
    for start in range(0, len(index), size):
        chunk = slice(start, start + size)
        yield index[chunk], op(images.index_select(0, index[chunk]), *(argument[chunk] for argument in arguments))


def update(images: Tensor, op: Callable[..., Tensor], index: Tensor, *arguments: Tensor) -> None:
    """images[index] = op(images[index], *arguments), in place."""
    for part, result in in_chunks(images, op, index, *arguments):
        images.index_copy_(0, part, result)


# ------------------------------------------------------------------------------- tables: one byte in, one byte out


def lookup(images: Tensor, tables: Tensor) -> Tensor:
    """Map each byte through its sample's and channel's table; tables: uint8 (N, 3, 256)."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def autocontrast_tables(images: Tensor) -> Tensor:
    """Tables (N, 3, 256) that stretch each channel from its darkest and lightest byte to 0 and 255."""
    low, high = (edge.double().unsqueeze(2) for edge in torch.aminmax(images.flatten(2), dim=2))
    values = torch.arange(256, dtype=torch.float64, device=images.device).expand(*low.shape[:2], 256)
    spread = high - low
    scale = torch.full_like(spread, 255.0) / spread.clamp(min=1.0)
    stretched = (values * scale + -low * scale).clamp_(0.0, 255.0)
    return torch.where(spread > 0, stretched, values).to(torch.uint8)


def equalize_tables(images: Tensor) -> Tensor:
    """Tables (N, 3, 256) that flatten each channel's histogram."""
    count, device = images.shape[0] * 3, images.device
    bins = torch.arange(count, device=device).unsqueeze(1) * 256 + images.reshape(count, -1)
    ones = torch.ones((), dtype=torch.int64, device=device).expand(bins.numel())
    histogram = torch.zeros(count * 256, dtype=torch.int64, device=device).scatter_add_(0, bins.flatten(), ones)
    histogram = histogram.view(*images.shape[:2], 256)
    values = torch.arange(256, device=device)
    lightest = images.flatten(2).amax(2, keepdim=True).long()
    step = (images.shape[2] * images.shape[3] - histogram.gather(2, lightest)) // 255
    below = histogram.cumsum(2) - histogram
    flat = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, flat, values).to(torch.uint8)  # one value only: step is 0 too


def contrast_tables(images: Tensor, factors: Tensor) -> Tensor:
    """Tables (N, 3, 256) that move bytes away from the sample's mean grey; factors: float32 (N,), 1 = no change."""
    pixels = images.shape[2] * images.shape[3]
    mean = (2 * grey(images).flatten(1).sum(1) + pixels) // (2 * pixels)  # int(mean + 0.5) in integers
    values = torch.arange(256, dtype=torch.float32, device=images.device)
    tables = blend(mean.float().view(-1, 1, 1), values.expand(len(images), 1, 256), factors.view(-1, 1, 1))
    return tables.expand(-1, 3, -1)


# ------------------------------------------------------------------------------------------------------- blends


def grey(images: Tensor) -> Tensor:
    """Luma (N, H, W), int32 of 0 to 255, in ITU-R 601-2 weights of 16 bits, as Pillow's mode "L"."""
    red, green, blue = images.int().unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def blend(degenerate: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """degenerate + factor * (image - degenerate), clamped and truncated; all float32, broadcast against each other."""
    return (degenerate + factors * (images - degenerate)).clamp_(0.0, 255.0).to(torch.uint8)


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Saturation; factors: float32 (N,), 0 = grey, 1 = no change."""
    return blend(grey(images).unsqueeze(1).float(), images.float(), factors.view(-1, 1, 1, 1))


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Sharpness; factors: float32 (N,), 0 = smoothed by (1 1 1; 1 5 1; 1 1 1) / 13 (not the border), 1 = no change."""
    pixels = images.float()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4.0 * pixels[:, :, 1:-1, 1:-1]
    smooth = pixels.clone()
    # No quotient is within 1/26 of where rounding changes, so the inexact reciprocal does no harm.
    smooth[:, :, 1:-1, 1:-1] = (total * (1.0 / 13.0) + 0.5).floor_()
    return blend(smooth, pixels, factors.view(-1, 1, 1, 1))


# ------------------------------------------------------------------------------------------------------ geometry


def _interpolate(taps: tuple[Tensor, ...], part: Tensor) -> Tensor:
    """Two taps: linear. Four: Keys' cubic with a = -1, which is Pillow's in transforms (its resize has a = -0.5).

    In Pillow's order of operations, in float64: then what is truncated afterwards is the same number.
    """
    if len(taps) == 2:
        return taps[0] + (taps[1] - taps[0]) * part
    one, two, three, four = taps
    curve = 2 * (one - two) + three - four
    return two + part * ((three - one) + part * (curve + part * (two - one - three + four)))


def _split(position: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinate (pixel i covers [i, i + 1)) -> the pixel whose centre is at or before it, and the rest."""
    position = position - 0.5
    base = position.floor()
    return base.long(), position - base


def _centres(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, dtype=torch.float64, device=device) + 0.5


def slide(
    images: Tensor, vertical: Tensor, slopes: Tensor, shifts: Tensor, fill: Tensor, offsets: tuple[int, ...]
) -> Tensor:
    """Shear or translate along one axis: out(u, v) = in(u + slope * v + shift, v), `fill` outside.

    vertical: bool (N,), whether u is y; slopes, shifts (pixels): float64 (N,); fill: uint8 (3, 1, 1); offsets of the
    taps: (0, 1) bilinear, (-1, 0, 1, 2) bicubic. Taps beyond the border take its pixel.
    """
    count, _, height, width = images.shape
    vertical, slopes, shifts = (each.view(-1, 1, 1) for each in (vertical, slopes, shifts))
    y, x = _centres(height, images.device).view(1, -1, 1), _centres(width, images.device).view(1, 1, -1)
    across = torch.where(vertical, x, y)
    position = torch.where(vertical, y, x) + slopes * across + shifts
    length = torch.where(vertical, height, width)
    stride = torch.where(vertical, width, 1)
    start = across.long() * torch.where(vertical, 1, width)
    inside = (position >= 0) & (position < length)
    base, part = _split(position)
    flat = images.flatten(2)

    def tap(offset: int) -> Tensor:
        place = torch.minimum((base + offset).clamp_(min=0), length - 1) * stride + start
        return flat.gather(2, place.view(count, 1, -1).expand(-1, 3, -1)).view_as(images).short()

    value = _interpolate(tuple(tap(offset) for offset in offsets), part.unsqueeze(1))
    return torch.where(inside.unsqueeze(1), value.clamp_(0.0, 255.0).to(torch.uint8), fill)


def affine(images: Tensor, matrices: Tensor, fill: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """out(x, y) = in(a x + b y + c, d x + e y + f), coordinates of pixel centres; matrices: float64 (N, 6), a to f.

    `fill` and `offsets` as in `slide`.
    """
    count, _, height, width = images.shape
    a, b, c, d, e, f = matrices.view(-1, 6, 1, 1).unbind(1)
    y, x = _centres(height, images.device).view(1, -1, 1), _centres(width, images.device).view(1, 1, -1)
    column, row = a * x + b * y + c, d * x + e * y + f
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    (column_base, column_part), (row_base, row_part) = _split(column), _split(row)
    columns = [(column_base + offset).clamp_(0, width - 1) for offset in offsets]
    column_part, row_part = column_part.unsqueeze(1), row_part.unsqueeze(1)
    flat = images.flatten(2)

    def line(offset: int) -> Tensor:
        start = (row_base + offset).clamp_(0, height - 1) * width
        places = [(start + column).view(count, 1, -1).expand(-1, 3, -1) for column in columns]
        return _interpolate(tuple(flat.gather(2, place).view_as(images).short() for place in places), column_part)

    value = _interpolate(tuple(line(offset) for offset in offsets), row_part)
    return torch.where(inside.unsqueeze(1), value.clamp_(0.0, 255.0).to(torch.uint8), fill)


# ------------------------------------------------------------------------------------------------ random erasing


def normal_table() -> Tensor:
    """float32 (65536,): equally likely values of N(0, 1), scaled to unit variance. A table, because log and cos of
    CPU and CUDA differ in the last bit.
    """
    size = 1 << NORMAL_BITS
    values = torch.special.ndtri((torch.arange(size, dtype=torch.float64) + 0.5) / size)
    return (values / values.std(correction=0)).float()


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * MIX_1) & MASK
    x = x ^ (x >> 15)
    x = (x * MIX_2) & MASK
    return x ^ (x >> 16)


def noise_bits(counters: Tensor, seeds: Tensor) -> Tensor:
    """32 random bits in int64 for each counter under seeds (..., 2) of 32 bits; the shapes broadcast."""
    return _mix(_mix((counters + seeds[..., 0]) & MASK) ^ seeds[..., 1])


def erase(images: Tensor, boxes: Tensor, areas: np.ndarray, table: Tensor) -> None:
    """Put N(0, 1) noise into boxes of float images (B, 3, H, W), contiguous, in place.

    boxes: int64 (E, 7): sample, top, left, height, width, two seeds; areas: height * width of each, known on the host;
    table: `normal_table`. The noise is a function of seeds, pixel and channel alone.
    """
    ends = np.flatnonzero(np.diff(np.cumsum(areas) // CHUNK_PIXELS, append=-1)) + 1
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        _erase_chunk(images, boxes[start:end], int(areas[start:end].sum()), table)


def _erase_chunk(images: Tensor, boxes: Tensor, pixels: int, table: Tensor) -> None:
    device, (height, width) = images.device, images.shape[2:]
    areas = boxes[:, 3] * boxes[:, 4]
    which = torch.repeat_interleave(torch.arange(len(boxes), device=device), areas, output_size=pixels)
    sample, top, left, _, box_width, *_ = boxes.index_select(0, which).unbind(1)
    place = torch.arange(pixels, device=device) - (areas.cumsum(0) - areas).index_select(0, which)
    row = place // box_width
    pixel = (top + row) * width + left + place - row * box_width
    channel = torch.arange(3, device=device).unsqueeze(1)
    bits = noise_bits(pixel * 3 + channel, boxes[:, 5:].index_select(0, which))
    target = (sample * 3 + channel) * (height * width) + pixel
    values = table.index_select(0, bits.flatten() >> (32 - NORMAL_BITS))
    images.view(-1).index_copy_(0, target.flatten(), values)
