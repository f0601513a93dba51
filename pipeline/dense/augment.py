"""An image and its mask, resized, cropped and mirrored together, by torchvision's transforms; drawn by key.

Source of the recipe: UPerNet's in the published HorNet, which is that of most work on ADE20K: a scale drawn from
[0.5, 2], a crop of one size in which no class fills more than 3/4, mirroring, photometric distortion.
Deviations: images shrink antialiased, and pixels outside of the image are ImageNet's mean colour, to a level of 255.
"""

from __future__ import annotations

import math

import torch
import torchvision.transforms.v2.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN
from torchvision.transforms import InterpolationMode

from data_prep.dense_set import IGNORED
from pipeline.config.dense import DenseAugment
from pipeline.data.keyed import flipped, uniform_one

MEAN_COLOUR = [round(255 * value) for value in IMAGENET_DEFAULT_MEAN]
# Draws of a view's key, see data/keyed.py: one scale, two for each try of a crop, the flip's own, then colours.
_SCALE_DRAW, _CROP_DRAWS, _CROP_TRIES, _COLOUR_DRAWS = 0, 1, 10, 49
# As torchvision's RandomPhotometricDistort has them.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05)


def fitted_size(height: int, width: int, short_side_px: int, long_side_max_px: int, scale: float) -> tuple[int, int]:
    """(H, W) of an image made so large that its shorter side is `short_side_px`, but its longer one at most
    `long_side_max_px`, and both then times `scale`.
    """
    factor = min(short_side_px / min(height, width), long_side_max_px / max(height, width)) * scale
    return max(1, math.floor(height * factor + 0.5)), max(1, math.floor(width * factor + 0.5))


def training_crop(
    image: torch.Tensor, mask: torch.Tensor, augment: DenseAugment, side: int, key: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (3, H, W) and (H, W) -> a crop of them, (3, side, side) and (side, side); `key` alone decides which.

    What lies outside of the image is 255 in the mask.
    """
    scale = drawn_scale(augment.scale_min, augment.scale_max, key)
    size = fitted_size(mask.shape[0], mask.shape[1], augment.short_side_px, augment.long_side_max_px, scale)
    image = F.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    mask = F.resize(mask[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
    image, mask = _crop(image, mask, augment, side, key)
    if flipped(key, augment.horizontal_flip):
        image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
    if augment.photometric:
        image = distorted(image, augment.photometric, key)
    return padded(image, side, MEAN_COLOUR), padded(mask[None], side, [IGNORED])[0]


def drawn_scale(least: float, most: float, key: int) -> float:
    """Uniform between both."""
    return least + (most - least) * uniform_one(key, _SCALE_DRAW)


def drawn_place(height: int, width: int, side: int, key: int, attempt: int = 0) -> tuple[int, int]:
    """(top, left) of a crop of an image, at most `side` high and wide; another one each attempt."""
    first = _CROP_DRAWS + 2 * attempt
    top = int(uniform_one(key, first) * (height - min(height, side) + 1))
    left = int(uniform_one(key, first + 1) * (width - min(width, side) + 1))
    return top, left


def _crop(
    image: torch.Tensor, mask: torch.Tensor, augment: DenseAugment, side: int, key: int
) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = mask.shape
    high, wide = min(height, side), min(width, side)
    top = left = 0
    for attempt in range(_CROP_TRIES):
        top, left = drawn_place(height, width, side, key, attempt)
        if augment.class_share_max == 1:
            break
        counts = torch.bincount(mask[top : top + high, left : left + wide].flatten(), minlength=IGNORED + 1)[:IGNORED]
        # One class alone is no reason to look elsewhere where there is no other.
        if int((counts > 0).sum()) > 1 and int(counts.max()) < augment.class_share_max * int(counts.sum()):
            break
    return image[:, top : top + high, left : left + wide], mask[top : top + high, left : left + wide]


def distorted(image: torch.Tensor, probability: float, key: int) -> torch.Tensor:
    """Brightness, contrast, saturation and hue, each with `probability`; contrast before the last two, or after."""

    def drawn(number: int, bounds: tuple[float, float]) -> float | None:
        first = _COLOUR_DRAWS + 2 * number
        if uniform_one(key, first) >= probability:
            return None
        return bounds[0] + (bounds[1] - bounds[0]) * uniform_one(key, first + 1)

    factors = [drawn(number, each) for number, each in enumerate((_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE))]
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    order = (0, 1, 2, 3) if uniform_one(key, _COLOUR_DRAWS + 8) < 0.5 else (0, 2, 3, 1)
    for number in order:
        factor = factors[number]
        if factor is not None:
            image = changes[number](image, factor)
    return image


def padded(image: torch.Tensor, side: int, fill: list[int]) -> torch.Tensor:
    """(C, H, W), neither larger than `side` -> (C, side, side), filled to the right and below."""
    channels, height, width = image.shape
    if (height, width) == (side, side):
        return image.contiguous()
    whole = torch.tensor(fill, dtype=image.dtype)[:, None, None].repeat(1, side, side)
    whole[:, :height, :width] = image
    assert len(whole) == channels
    return whole
