"""Maps that stay finer than stride 32, by dilation: the same weights, seen at every offset.

A stage of dilation d works on the d * d maps that are left when every d-th row and column is taken, one after the other
along the batch, (d * d * B, H / d, W / d, C). On these a dilated convolution is a plain one, and so is everything else:
kernels, what is kept for backward, compiled blocks and global filters (which keep the size they were trained for) know
nothing of it. What stands at even rows and columns is what the net without dilation computes there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.models.block import Keep


def at_offsets(downsample: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`downsample`, which halves a map (B, H, W, C), at all four offsets: (4 B, ceil(H / 2), ceil(W / 2), C').

    Offsets are (row, column) = (0, 0), (0, 1), (1, 0), (1, 1). Past its edge the map's last row or column stands again.
    """
    height, width = x.shape[1:3]
    x = torch.cat([x, *[x[:, -1:]] * (1 + height % 2)], 1)
    x = torch.cat([x, *[x[:, :, -1:]] * (1 + width % 2)], 2)
    height, width = height + height % 2, width + width % 2
    moved = [x[:, i : i + height, j : j + width].contiguous() for i in range(2) for j in range(2)]
    return torch.cat([downsample(each) for each in moved])


def whole(x: Tensor, dilation: int, size: tuple[int, int]) -> Tensor:
    """The maps of `at_offsets` put together: (d * d * B, H', W', C) -> (B, *size, C), without what is past its edge."""
    while dilation > 1:
        count, height, width, channels = x.shape
        x = x.view(2, 2, count // 4, height, width, channels).permute(2, 3, 0, 4, 1, 5)
        x = x.reshape(count // 4, 2 * height, 2 * width, channels)
        dilation //= 2
    return x[:, : size[0], : size[1]]


def at_all_offsets(keep: Keep, batch: int, dilation: int) -> Keep:
    """What drop path leaves of `batch` samples, for their `dilation`**2 maps each."""
    maps = dilation**2
    if maps == 1:
        return keep
    rows, mask, position = keep.rows, keep.mask, keep.position
    if mask is not None:
        mask = mask.repeat(maps, 1, 1, 1)
    if rows is not None:
        if position is not None:
            shifts = len(rows) * torch.arange(maps, device=position.device)[:, None]
            position = torch.where(position >= 0, position + shifts, -1).flatten()
        rows = (rows + batch * torch.arange(maps, device=rows.device)[:, None]).flatten()
    return keep._replace(rows=rows, mask=mask, position=position)
