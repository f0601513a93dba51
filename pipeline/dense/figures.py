"""Pictures of a segmentation: its classes by how well they are found, the images that went best and worst."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torchvision.transforms import InterpolationMode

from data_prep.dense_set import IGNORED
from data_prep.storage import atomic_write
from pipeline.dense.data import Labelled

_SIDE_PX = 224  # the longer one, of a picture
_EACH = 4  # of the best, and of the worst
_GOLDEN = 0.618034  # of the circle: hues of neighbouring labels are far apart
_MOST_CLASSES = 60  # named in the legend of a sheet
_STRIP_BYTES = 50_000  # what a page of runs takes
_QUALITIES = (88, 75, 60, 40, 20)
_GAP_PX = 4


class Shown(NamedTuple):
    """One image, small: pixels uint8 (h, w, 3), its mask and what was found, both uint8 (h, w)."""

    score: float
    name: str
    pixels: np.ndarray
    mask: np.ndarray
    found: np.ndarray


def shown(labelled: Labelled, found: torch.Tensor, iou: float, name: str) -> Shown:
    """Of an image and the labels `found` (H, W) in it."""
    scale = _SIDE_PX / max(labelled.mask.shape)
    size = [max(1, round(side * scale)) for side in labelled.mask.shape]
    image = F.resize(labelled.image, size, InterpolationMode.BILINEAR, antialias=True)
    labels = torch.stack([labelled.mask, found.to("cpu", torch.uint8)])
    mask, predicted = F.resize(labels, size, InterpolationMode.NEAREST_EXACT).numpy()
    return Shown(iou, name, image.permute(1, 2, 0).numpy(), mask, predicted)


class Scored(Protocol):
    """What `kept` asks of a picture: a score, percent, and a name that tells equal ones apart."""

    @property
    def score(self) -> float: ...

    @property
    def name(self) -> str: ...


_Picture = TypeVar("_Picture", bound=Scored)


def kept(pictures: Sequence[_Picture]) -> list[_Picture]:
    """Those of the highest and of the lowest score, the highest first."""
    ordered = sorted(pictures, key=lambda each: (-each.score, each.name))
    return ordered if len(ordered) <= 2 * _EACH else [*ordered[:_EACH], *ordered[-_EACH:]]


def colours(classes: int) -> np.ndarray:
    """A colour for each label, uint8 (256, 3); ignored pixels are white."""
    table = np.full((IGNORED + 1, 3), 255, np.uint8)
    for label in range(classes):
        lightness = (0.35, 0.5, 0.65)[label % 3]
        table[label] = [round(255 * part) for part in colorsys.hls_to_rgb(label * _GOLDEN % 1, lightness, 0.75)]
    return table


def draw_sheet(pictures: Sequence[Shown], classes: Sequence[str], path: Path) -> None:
    """A row for each image: itself, its mask, what was found; the classes that are in them. Raises OSError."""
    if not pictures:
        return
    table = colours(len(classes))
    figure = Figure(figsize=(9, 2.6 * len(pictures) + 0.8), layout="constrained")
    for row, each in zip(figure.subplots(len(pictures), 3, squeeze=False), pictures, strict=True):
        for axes, pixels in zip(row, (each.pixels, table[each.mask], table[each.found]), strict=True):
            axes.imshow(pixels)
            axes.set_axis_off()
        row[0].set_title(each.name.rpartition(": ")[2], fontsize=7)
        row[1].set_title("mask", fontsize=7)
        row[2].set_title(f"found: IoU {each.score:.1f} %", fontsize=7)
    labels = np.unique(np.concatenate([np.append(each.mask, each.found) for each in pictures]))
    patches = [
        Patch(color=table[label] / 255, label=classes[label]) for label in labels.tolist() if label < len(classes)
    ]
    figure.legend(handles=patches[:_MOST_CLASSES], loc="outside lower center", ncols=6, fontsize=7)
    save(figure, path)


def strip_of(each: Shown, table: np.ndarray) -> np.ndarray:
    """The image, its mask and what was found beside each other, uint8 (h, w, 3); `table`: see `colours`."""
    return beside(each.pixels, table[each.mask], table[each.found])


def beside(*pictures: np.ndarray) -> np.ndarray:
    """Pictures uint8 (h, w, 3) of one height in a row, with white between them."""
    gap = np.full((pictures[0].shape[0], _GAP_PX, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (gap, picture)][1:], axis=1)


def save_strip(pixels: np.ndarray, path: Path) -> None:
    """As JPEG, as good as fits into a page of runs. Raises OSError."""
    for quality in _QUALITIES:
        written = io.BytesIO()
        Image.fromarray(pixels).save(written, "JPEG", quality=quality)
        if written.tell() <= _STRIP_BYTES:
            break
    with atomic_write(path) as file:
        file.write(written.getvalue())


def strip_name(number: int) -> str:
    """The file of the picture of that rank, from 1, among those that are kept."""
    return f"picture-{number}.jpg"


def pictures_told(
    pictures: Sequence[Scored], labels: Sequence[Sequence[int]], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """What a result file says of pictures, the best first, with the classes that each shows and their colours."""
    table = colours(len(classes))
    return [
        {
            "file": strip_name(number),
            "name": each.name.rpartition(": ")[2],
            "score_percent": round(each.score, 4),
            "classes": {classes[label]: "#" + table[label].tobytes().hex() for label in seen[:_MOST_CLASSES]},
        }
        for number, (each, seen) in enumerate(zip(pictures, labels, strict=True), 1)
    ]


def draw_classes(rows: Sequence[dict[str, Any]], key: str, label: str, path: Path) -> None:
    """A bar for each class whose `key`, percent, is known, the best first. Raises OSError."""
    known = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key])
    figure = Figure(figsize=(7, 1 + 0.17 * len(known)), layout="constrained")
    axes = figure.subplots()
    axes.barh([row["class"] for row in known], [row[key] for row in known], color="#4878a8")
    axes.set_xlabel(label)
    axes.set_xlim(0, 100)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """As PNG, whole or not at all. Raises OSError."""
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110)
    with atomic_write(path) as file:
        file.write(written.getvalue())
