"""Pictures of a detection: precision over recall, the images that went best and worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.transforms import InterpolationMode
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from pipeline.dense.data import Annotated
from pipeline.dense.figures import beside, colours, save
from pipeline.detection.average_precision import MASK_THRESHOLD
from pipeline.detection.data import objects_of
from pipeline.detection.scenes import Found

CURVES = "precision_recall.png"
_SIDE_PX = 320  # the longer one, of a picture
_SCORE_MIN = 0.3  # of boxes that are drawn in any case
_MOST = 30  # boxes in a picture
_NAMES = {"ap50": "IoU 0.5", "ap75": "IoU 0.75", "ap": "mean of 0.5 to 0.95"}


class Side(NamedTuple):
    """One of both pictures: pixels uint8 (h, w, 3), masks painted in; boxes (N, 4) in them; labels; scores or None."""

    pixels: np.ndarray
    boxes: np.ndarray
    labels: list[int]
    scores: list[float] | None


class Shown(NamedTuple):
    """One image, small: what is true, what was found, and how well."""

    score: float
    name: str
    true: Side
    found: Side


def shown(annotated: Annotated, found: Found, score: float, name: str) -> Shown:
    """Of an image, its objects without crowds, and what was `found` in it."""
    height, width = annotated.image.shape[1:]
    scale = _SIDE_PX / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    image = F.resize(annotated.image, list(size), InterpolationMode.BILINEAR, antialias=True)
    ratio = torch.tensor([size[1] / width, size[0] / height] * 2)

    none = torch.zeros(0, *size, dtype=torch.bool)

    objects, masks = objects_of(annotated.annotations, height, width, masks=False), none
    known = objects_of(annotated.annotations, height, width, masks=found.masks is not None).masks
    if known is not None and 0 < len(known) == len(objects.labels):
        masks = F.resize(known, list(size), InterpolationMode.NEAREST_EXACT).bool()
    true = _side(image, objects.boxes * ratio, objects.labels, None, masks)

    # Of each class at least as many as are true: what is found with little certainty counts in the score, by its rank.
    drawn = found.scores.cpu() >= _SCORE_MIN
    for label in objects.labels.unique():
        drawn[(found.labels.cpu() == label).nonzero()[: int((objects.labels == label).sum()), 0]] = True
    best = drawn.nonzero()[:_MOST, 0]
    boxes, scores, labels = (each.cpu()[best] for each in (found.boxes, found.scores, found.labels))
    masks = none
    if found.masks is not None and len(scores):
        pasted = paste_masks_in_image(found.masks.cpu()[best][:, None].float(), boxes * ratio, size)
        masks = pasted[:, 0] >= MASK_THRESHOLD
    return Shown(score, name, true, _side(image, boxes * ratio, labels, scores, masks))


def _side(
    image: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, scores: torch.Tensor | None, masks: torch.Tensor
) -> Side:
    table = colours(256)
    for mask, label in zip(masks.flip(0), labels.flip(0).tolist(), strict=False):
        # One by one, the best last: where several overlap, torchvision (0.29.2) paints black.
        image = draw_segmentation_masks(image, mask[None], 0.5, tuple(table[label % 255].tolist()))
    told = None if scores is None else scores.tolist()
    return Side(image.permute(1, 2, 0).numpy(), boxes.numpy(), labels.tolist(), told)


def draw_sheet(pictures: Sequence[Shown], classes: Sequence[str], path: Path) -> None:
    """A row for each image: what is true in it, what was found. Raises OSError."""
    if not pictures:
        return
    figure = Figure(figsize=(9, 3.6 * len(pictures)), layout="constrained")
    for row, each in zip(figure.subplots(len(pictures), 2, squeeze=False), pictures, strict=True):
        row[0].set_title(each.name.rpartition(": ")[2], fontsize=7)
        row[1].set_title(f"found: AP {each.score:.1f} %", fontsize=7)
        for axes, side in zip(row, (each.true, each.found), strict=True):
            _draw(axes, side, classes)
    save(figure, path)


def strip_of(each: Shown, classes: Sequence[str]) -> np.ndarray:
    """What is true in the image and what was found beside each other, uint8 (h, w, 3)."""
    return beside(*(_boxed(side, classes) for side in (each.true, each.found)))


def _boxed(side: Side, classes: Sequence[str]) -> np.ndarray:
    if not side.labels:  # torchvision warns
        return side.pixels
    names = [classes[label] for label in side.labels]
    if side.scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, side.scores, strict=True)]
    table = colours(256)
    own = [tuple(table[label % 255].tolist()) for label in side.labels]
    drawn = draw_bounding_boxes(
        torch.from_numpy(side.pixels).permute(2, 0, 1),
        torch.from_numpy(side.boxes),
        labels=names,
        colors=own,
        width=2,
        label_colors="white",
        label_background_colors=own,
        fill_labels=True,
    )
    return drawn.permute(1, 2, 0).numpy()


def _draw(axes: Any, side: Side, classes: Sequence[str]) -> None:
    axes.imshow(side.pixels)
    axes.set_axis_off()
    table = colours(256) / 255
    for number, ((x0, y0, x1, y1), label) in enumerate(zip(side.boxes.tolist(), side.labels, strict=True)):
        colour = table[label % 255]
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2))
        text = classes[label] if side.scores is None else f"{classes[label]} {side.scores[number]:.2f}"
        axes.text(x0, y0, text, fontsize=5, color="white", va="bottom", bbox={"facecolor": colour, "pad": 0.6, "lw": 0})


def draw_curves(curves: Mapping[str, np.ndarray], path: Path) -> None:
    """Precision over recall, the mean over classes, of boxes and, where they are known, masks. Raises OSError."""
    kinds = [kind for kind in ("box", "mask") if f"{kind}_ap" in curves]
    figure = Figure(figsize=(4.4 * len(kinds), 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for name, told in _NAMES.items():
            values = curves[f"{kind}_{name}"]
            axes.plot(curves["recall"], values, label=f"{told}: AP {100 * float(values.mean()):.1f} %")
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title({"box": "boxes", "mask": "masks"}[kind])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    save(figure, path)
