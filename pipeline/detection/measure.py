"""A detection measured: every image once over all ranks, a folder of results; see `pipeline/dense/measuring.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.checkpoints.state import read_tensors
from pipeline.config.detect import DetectConfig
from pipeline.dense.data import Annotated, DenseReader
from pipeline.dense.figures import draw_classes, kept, pictures_told, save_strip, strip_name
from pipeline.dense.measuring import (
    CLASSES_PICTURE,
    SHEET,
    Asked,
    Kind,
    Measured,
    Opened,
    measure_on_ranks,
    open_asked,
)
from pipeline.detection.average_precision import Evaluator
from pipeline.detection.data import validation_images
from pipeline.detection.detector import build_detector
from pipeline.detection.evaluate import evaluated, summarised
from pipeline.detection.figures import CURVES, Shown, draw_curves, draw_sheet, shown, strip_of
from pipeline.detection.opened import open_measured
from pipeline.detection.scenes import Found
from pipeline.evaluation.ranks import progress
from pipeline.ranks.collectives import Ranks


class Part(NamedTuple):
    """Of one rank: what `Evaluator.parts` has, the number of its images, its best and worst ones."""

    parts: Any
    images: int
    pictures: list[Shown]


def _protocol(config: DetectConfig) -> str:
    """In the name of a result: another protocol's takes no other's place."""
    return "-flip" if config.evaluate.flip else ""


KIND = Kind("detect", DetectConfig, open_measured, _protocol, "detection.json", "box_ap")


def evaluate_detection(asked: Asked, ranks_here: int = 1) -> int:
    """Measure, write the result folder, print a table; returns the exit code. See `open_asked` for what is raised.

    ranks_here: processes to start on this host, where no launcher has started them.
    """
    opened = open_asked(KIND, asked, {"flip": asked.flip or None})
    return measure_on_ranks(KIND, asked, opened, ranks_here, measure, _whole)


def measure(opened: Opened[DetectConfig], ranks: Ranks, device: torch.device) -> Part:
    """This rank's images."""
    config, names = opened.config, opened.data.classes
    net = build_detector(config.model, opened.data.num_classes, config.data.resolution)
    net.load_state_dict(read_tensors(opened.weights.file))
    reader = DenseReader(config.data.path, opened.data, "val")
    pictures: list[Shown] = []

    def look(annotated: Annotated, found: Found) -> None:
        if any(not each["iscrowd"] for each in annotated.annotations):
            own = _own_ap(annotated, found, names)
            pictures.append(shown(annotated, found, own, reader.describe(annotated.sample)))
            pictures[:] = kept(pictures)

    def counted() -> Iterator[Annotated]:
        total = len(range(ranks.rank, len(reader), ranks.count))
        images = validation_images(config, reader, ranks)
        with progress(total, ranks) as bar:
            for each in images:
                yield each
                bar.update()

    evaluator, images = evaluated(
        *(net.to(device), counted(), names, config.evaluate, config.model.detections, device),
        config.train.bf16_on(device.type),
        look,
    )
    return Part(evaluator.parts(), images, pictures)


def _own_ap(annotated: Annotated, found: Found, class_names: list[str]) -> float:
    """Average precision of the boxes of one image, percent."""
    alone = Evaluator(class_names)
    height, width = annotated.image.shape[1:]
    alone.add(annotated.image_id, (height, width), annotated.annotations, found._replace(masks=None))
    return alone.results()["box_ap"]


def _whole(opened: Opened[DetectConfig], parts: Sequence[Part]) -> Measured:
    evaluator = Evaluator(opened.data.classes)
    for part in parts:
        evaluator.merge(part.parts)
    results = summarised(evaluator, sum(part.images for part in parts))
    curves = evaluator.curves()
    classes = [_row(label, row) for label, row in enumerate(evaluator.per_class())]
    pictures = kept([each for part in parts for each in part.pictures])

    def draw(folder: Path) -> None:
        draw_classes(classes, "box_ap_percent", "average precision of boxes, %", folder / CLASSES_PICTURE)
        draw_curves(curves, folder / CURVES)
        draw_sheet(pictures, opened.data.classes, folder / SHEET)
        for number, each in enumerate(pictures, 1):
            save_strip(strip_of(each, opened.data.classes), folder / strip_name(number))

    seen = [sorted({*each.true.labels, *each.found.labels}) for each in pictures]
    more = {
        "curves": {name: [round(float(value), 5) for value in values] for name, values in curves.items()},
        "pictures": pictures_told(pictures, seen, opened.data.classes),
    }
    return Measured(results, classes, more, lambda console: _print(console, results, classes), draw)


def _row(label: int, found: dict[str, Any]) -> dict[str, Any]:
    def percent(value: float | None) -> float | None:
        return None if value is None else round(value, 4)

    return {
        "label": label,
        "class": found["class"],
        "annotations": found["annotations"],
        "box_ap_percent": percent(found["box_ap"]),
        "mask_ap_percent": percent(found["mask_ap"]),
    }


def _print(console: Console, results: dict[str, Any], classes: list[dict[str, Any]]) -> None:
    table = Table("of", *(f"{name} %" for name in ("AP", "AP50", "AP75", "small", "medium", "large")), "images")
    for kind in ("box", "mask"):
        if f"{kind}_ap" in results:
            keys = (f"{kind}_ap{more}" for more in ("", "50", "75", "_small", "_medium", "_large"))
            numbers = (f"{results[key]:.2f}" if key in results else "-" for key in keys)
            table.add_row({"box": "boxes", "mask": "masks"}[kind], *numbers, f"{results['val_samples']:.0f}")
    console.print(table)
    known = sorted((row for row in classes if row["box_ap_percent"] is not None), key=lambda row: row["box_ap_percent"])
    worst = ", ".join(f"{row['class']} {row['box_ap_percent']:.1f}" for row in known[:5])
    console.print(Text(f"lowest: {worst}"), soft_wrap=True)
    if absent := len(classes) - len(known):
        console.print(Text(f"{absent} classes are in no image: they count in no mean"))
