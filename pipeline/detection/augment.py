"""An image and its objects by large-scale jitter: resized, cropped, mirrored together; drawn by key.

Source: Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation, Ghiasi et al. 2021, section 3
(large-scale jitter: a scale from 0.1 to 2.0 of what fits into the square, then a crop or a margin). Colours, scale and
place are drawn as for segmentations.
"""

from __future__ import annotations

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode

from pipeline.config.detect import DetectionAugment
from pipeline.data.keyed import flipped
from pipeline.dense.augment import MEAN_COLOUR, distorted, drawn_place, drawn_scale, fitted_size, padded
from pipeline.detection.scenes import Objects


def training_view(
    image: Tensor, objects: Objects, augment: DetectionAugment, side: int, key: int
) -> tuple[Tensor, Objects]:
    """uint8 (3, H, W) -> uint8 (3, side, side) and what is left in it of the objects; `key` alone decides what is seen.

    Of an object that the crop has cut, the box is that of what is left of its mask, where it has one. Objects of which
    less than augment.box_side_min_px is left by width or height, or nothing of the mask, are left out.
    """
    height, width = image.shape[1:]
    scale = drawn_scale(augment.scale_min, augment.scale_max, key)
    high, wide = fitted_size(height, width, side, side, scale)
    top, left = drawn_place(high, wide, side, key)
    crop = (min(high, side), min(wide, side))
    mirrored = flipped(key, augment.horizontal_flip)
    image = F.resize(image, [high, wide], InterpolationMode.BILINEAR, antialias=True)
    image = image[:, top : top + crop[0], left : left + crop[1]]
    image = F.horizontal_flip(image) if mirrored else image
    if augment.photometric:
        image = distorted(image, augment.photometric, key)

    boxes = objects.boxes * torch.tensor([wide / width, high / height] * 2) - torch.tensor([left, top] * 2)
    masks = None
    if objects.masks is not None:
        rows, columns = _nearest(height, high)[top : top + crop[0]], _nearest(width, wide)[left : left + crop[1]]
        masks = objects.masks[:, rows[:, None], columns]
    boxes, masks = _within(boxes, masks, crop)
    if mirrored:
        boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1.0, -1.0, 1.0]) + torch.tensor([crop[1], 0, crop[1], 0])
        masks = None if masks is None else masks.flip(2)
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = ((sides > 0) & (sides >= augment.box_side_min_px)).all(1)
    if masks is not None:
        kept &= _any(masks)
        masks = pad(masks[kept], (0, side - crop[1], 0, side - crop[0]))
    return padded(image, side, MEAN_COLOUR), Objects(boxes[kept], objects.labels[kept], masks)


def _nearest(before: int, after: int) -> Tensor:
    """Which of `before` pixels each of `after` is made of, as torchvision's NEAREST_EXACT has it; int64 (after,).

    Masks are many, and large before they are cropped: only what is seen is read.
    """
    return ((torch.arange(after, dtype=torch.float32) + 0.5) * (before / after)).long().clamp_(max=before - 1)


def _within(boxes: Tensor, masks: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Boxes (N, 4) clipped to an image of `size` (H, W); those that were cut, to what is left of their masks too."""
    high, wide = size
    clipped = boxes.clamp(torch.zeros(4), torch.tensor([wide, high, wide, high], dtype=torch.float32))
    if masks is None:
        return clipped, None
    cut = (clipped != boxes).any(1) & _any(masks)
    if cut.any():
        inner = masks_to_boxes(masks[cut])
        inner[:, 2:] += 1  # of the last pixel's far side
        clipped[cut] = torch.cat([clipped[cut, :2].maximum(inner[:, :2]), clipped[cut, 2:].minimum(inner[:, 2:])], 1)
    return clipped, masks


def _any(masks: Tensor) -> Tensor:
    """Which of them have a pixel: bool (N,). (torch 2.15: `any` of uint8 is uint8.)"""
    return masks.flatten(1).any(1).bool()
