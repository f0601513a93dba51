"""Pictures for people: training images as the model sees them; loss, accuracy and schedule; an evaluation's figures."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize, to_pil_image
from torchvision.utils import make_grid

from data_prep.storage import atomic_write

SHEET, CURVES = "training_images.jpg", "curves.png"
RELIABILITY, CONFUSION = "reliability.png", "confusion.png"
_SHOWN_IMAGES, _ROW = 32, 8
_LEAST_SIDE, _MOST_SIDE = 96, 192
_ACCURACIES = {
    "top1": "top-1",
    "top1_model": "top-1 of raw weights",
    "top5": "top-5",
    "miou": "mIoU",
    "miou_model": "mIoU of raw weights",
    "pixel_accuracy": "pixels",
    "box_ap": "box AP",
    "box_ap_model": "box AP of raw weights",
    "mask_ap": "mask AP",
}


def draw_sheet(images: torch.Tensor, path: Path) -> None:
    """Write the first of a batch (N, 3, H, W), normalised as the model takes it, as one JPEG. Raises OSError."""
    shown = images[:_SHOWN_IMAGES].detach().float().cpu()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    shown = (shown * std + mean).clamp(0, 1)
    side = min(_MOST_SIDE, max(_LEAST_SIDE, shown.shape[-1]))
    if side < shown.shape[-1]:
        shown = resize(shown, [side, side], antialias=True)
    elif side > shown.shape[-1]:
        shown = resize(shown, [side, side], InterpolationMode.NEAREST)
    written = io.BytesIO()
    to_pil_image(make_grid(shown, nrow=_ROW, padding=4, pad_value=1.0)).save(written, format="JPEG", quality=90)
    with atomic_write(path) as file:
        file.write(written.getvalue())


def draw_curves(lines: Iterable[str], name: str, path: Path) -> None:
    """Write loss, accuracy and learning rate over steps, from the lines of a log.jsonl. Raises OSError."""
    from matplotlib.figure import Figure  # not pyplot, which asks for a screen

    records: list[Mapping[str, float]] = [json.loads(line) for line in lines]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, accuracy, schedule = figure.subplots(1, 3)
    _plot(loss, records, {"loss": "training", "val_loss": "validation"})
    loss.set_title("loss")
    _plot(accuracy, records, _ACCURACIES)
    accuracy.set_title("accuracy, %")
    _plot(schedule, records, {"lr": "learning rate"})
    schedule.set_title("learning rate")
    for each in (loss, accuracy, schedule):
        each.set_xlabel("step")
        each.grid(alpha=0.3)
    figure.suptitle(name)
    _save(figure, path)


def draw_evaluation(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write an evaluation.json's calibration, and its confusion where it has one; returns the files. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axes = figure.subplots()
    bins = [each for each in content["reliability"] if each["confidence"] is not None]
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    width = 0.9 * (bins[0]["high"] - bins[0]["low"]) if bins else 0.1
    axes.bar([each["confidence"] for each in bins], [each["accuracy"] for each in bins], width=width, alpha=0.7)
    axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    ece = content["results"]["ece"]
    axes.set_title("calibration" if ece is None else f"calibration, ECE {ece:.3f}")
    drawn = [_save(figure, folder / RELIABILITY)]
    if (confusion := content["confusion"]) is None:
        return drawn
    names = [group["name"] for group in confusion["groups"]]
    shares = torch.tensor(confusion["matrix"], dtype=torch.float64)
    shares = 100 * shares / shares.sum(1, keepdim=True).clamp(min=1)
    side = max(4.0, 1.8 + 0.32 * len(names))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="taken for", ylabel="images of")
    figure.colorbar(shown, ax=axes, label="% of the row", shrink=0.7)
    return [*drawn, _save(figure, folder / CONFUSION)]


def _save(figure: Any, path: Path) -> Path:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=110)
    with atomic_write(path) as file:
        file.write(written.getvalue())
    return path


def _plot(axes: Any, records: list[Mapping[str, float]], named: Mapping[str, str]) -> None:
    drawn = 0
    for key, label in named.items():
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=label, marker="o" if len(points) < 20 else None, markersize=3)
            drawn += 1
    if drawn > 1:
        axes.legend(frameon=False)
