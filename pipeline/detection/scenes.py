"""What goes into a detector and what comes out of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Objects(NamedTuple):
    """The true objects of one image, N of them (0 too), crowds left out.

    boxes: float32 (N, 4), x0 y0 x1 y1 in pixels of the image, x1 > x0, y1 > y0; labels: int64 (N,), from 0; masks:
    uint8 (N, H, W), 0 or 1, or None where the set or the task has none.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None


class Scenes(NamedTuple):
    """A micro-batch: images, float32 (B, 3, S, S), normalised; the objects of each."""

    images: Tensor
    objects: tuple[Objects, ...]


class Found(NamedTuple):
    """What a detector found in one image, best score first.

    boxes: float32 (N, 4), x0 y0 x1 y1 in pixels of the image that went in, clipped to it; scores: float32 (N,), 0 to 1;
    labels: int64 (N,), from 0; masks: float32 (N, 28, 28), probabilities inside of each box, or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None
