"""A segmentation measured: every image once over all ranks, a folder of results; see `measuring.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.checkpoints.state import read_tensors
from pipeline.config.dense import SegmentConfig
from pipeline.dense import measuring
from pipeline.dense.data import DenseReader, Labelled, validation_images
from pipeline.dense.evaluate import class_ious, confusion, image_iou, summarised
from pipeline.dense.figures import (
    Shown,
    colours,
    draw_classes,
    draw_sheet,
    kept,
    pictures_told,
    save_strip,
    shown,
    strip_name,
    strip_of,
)
from pipeline.dense.measuring import CLASSES_PICTURE, SHEET, Kind, Measured, Opened, measure_on_ranks, open_asked
from pipeline.dense.opened import open_dense
from pipeline.dense.segmentor import Segmentor
from pipeline.evaluation.ranks import progress
from pipeline.ranks.collectives import Ranks, sum_over_ranks

Part = tuple[torch.Tensor, float, int, list[Shown]]


@dataclass(frozen=True)
class Asked(measuring.Asked):
    """What `evaluate-segment` was asked for."""

    mode: str | None = None
    stride: int | None = None
    scales: tuple[float, ...] | None = None


def _protocol(config: SegmentConfig) -> str:
    """In the name of a result: another protocol's takes no other's place."""
    asked = config.evaluate
    text = "" if asked.mode == "whole" else f"-slide{asked.stride_px}"
    text += "" if asked.scales == (1.0,) else "-x" + "+".join(f"{scale:g}" for scale in asked.scales)
    return text + ("-flip" if asked.flip else "")


KIND = Kind("segment", SegmentConfig, open_dense, _protocol, "segmentation.json", "miou")


def evaluate_segmentation(asked: Asked, ranks_here: int = 1) -> int:
    """Measure, write the result folder, print a table; returns the exit code. See `open_asked` for what is raised.

    ranks_here: processes to start on this host, where no launcher has started them.
    """
    changes = {"mode": asked.mode, "stride_px": asked.stride, "scales": asked.scales, "flip": asked.flip or None}
    return measure_on_ranks(KIND, asked, open_asked(KIND, asked, changes), ranks_here, measure, _whole)


def _whole(opened: Opened[SegmentConfig], parts: Sequence[Part]) -> Measured:
    pixels, loss, count, _ = parts[0]  # the same on all ranks but for the pictures
    results, table, names = summarised(pixels, loss, count), _classes(opened, pixels), opened.data.classes
    pictures = kept([each for part in parts for each in part[3]])

    def draw(folder: Path) -> None:
        draw_classes(table, "iou_percent", "intersection over union, %", folder / CLASSES_PICTURE)
        draw_sheet(pictures, names, folder / SHEET)
        for number, each in enumerate(pictures, 1):
            save_strip(strip_of(each, colours(len(names))), folder / strip_name(number))

    seen = [[label for label in np.union1d(each.mask, each.found).tolist() if label < len(names)] for each in pictures]
    protocol = opened.config.evaluate.model_dump(exclude={"every_epochs"})
    more = {
        "protocol": {**protocol, "window_px": opened.config.data.resolution},
        "pictures": pictures_told(pictures, seen, names),
    }
    return Measured(results, table, more, lambda console: _print(console, results, table), draw)


def measure(opened: Opened[SegmentConfig], ranks: Ranks, device: torch.device) -> Part:
    """What `confusion` returns, of all ranks, and this rank's best and worst images. A collective."""
    config, weights = opened.config, opened.weights
    net = Segmentor(config.model, opened.data.num_classes, config.data.resolution)
    net.load_state_dict(read_tensors(weights.file))
    reader = DenseReader(config.data.path, opened.data, "val")
    pictures: list[Shown] = []

    def look(labelled: Labelled, found: torch.Tensor, pixels: torch.Tensor) -> None:
        if pixels.sum():
            pictures.append(shown(labelled, found, image_iou(pixels), reader.describe(labelled.sample)))
            pictures[:] = kept(pictures)

    def counted() -> Iterator[Labelled]:
        total = len(range(ranks.rank, len(reader), ranks.count))
        images = validation_images(config, reader, ranks)
        with progress(total, ranks) as bar:
            for each in images:
                yield each
                bar.update()

    whole = confusion(
        *(net.to(device), counted(), config.evaluate, config.data.resolution, opened.data.num_classes, device),
        *(config.train.bf16_on(device.type), lambda sums: sum_over_ranks(sums.cpu()) if ranks.count > 1 else sums),
        look=look,
    )
    return *whole, pictures


def _classes(opened: Opened[SegmentConfig], pixels: torch.Tensor) -> list[dict[str, Any]]:
    """A row a class, by label."""
    ious, names = class_ious(pixels).tolist(), opened.data.classes
    rows = []
    for label, name in enumerate(names):
        wrong = pixels[label].clone()
        wrong[label] = 0
        true, found = int(pixels[label].sum()), int(pixels[:, label].sum())
        hits = int(pixels[label, label])
        rows.append(
            {
                "label": label,
                "class": name,
                "iou_percent": None if ious[label] != ious[label] else round(ious[label], 4),
                "recall_percent": round(100 * hits / true, 4) if true else None,
                "precision_percent": round(100 * hits / found, 4) if found else None,
                "pixels": true,
                "mistaken_for": names[int(wrong.argmax())] if int(wrong.max()) else "",
            }
        )
    return rows


def _print(console: Console, results: dict[str, Any], classes: list[dict[str, Any]]) -> None:
    table = Table()
    for column in ("mIoU %", "class accuracy %", "pixels %", "loss", "images"):
        table.add_column(column, justify="right")
    table.add_row(
        *(f"{results[key]:.2f}" for key in ("miou", "macc", "pixel_accuracy")),
        *(f"{results['val_loss']:.4f}", f"{results['val_samples']:.0f}"),
    )
    console.print(table)
    known = sorted((row for row in classes if row["iou_percent"] is not None), key=lambda row: row["iou_percent"])
    worst = ", ".join(f"{row['class']} {row['iou_percent']:.1f}" for row in known[:5])
    console.print(Text(f"lowest: {worst}"), soft_wrap=True)
    if absent := int(results["classes_absent"]):
        console.print(Text(f"{absent} classes are in no image and in no prediction: they count in no mean"))
