"""A segmentation measured, top to bottom: opened and checked, every image once over all ranks, a folder of results."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from data_prep.dense_set import DenseManifest
from data_prep.storage import atomic_folder
from pipeline.checkpoints.files import CheckpointError
from pipeline.checkpoints.restore import Weights, find_weights
from pipeline.checkpoints.state import read_tensors
from pipeline.config.dense import SegmentConfig
from pipeline.dense.data import DenseReader, Labelled, validation_images
from pipeline.dense.evaluate import class_ious, confusion, image_iou, summarised
from pipeline.dense.figures import Shown, draw_classes, draw_sheet, kept, shown
from pipeline.dense.opened import check_files, open_dense
from pipeline.dense.segmentor import Segmentor
from pipeline.evaluation.ranks import join, start_here
from pipeline.evaluation.result import EVALUATIONS, check_name, folder_name
from pipeline.ranks.collectives import Ranks, gather, sum_over_ranks
from pipeline.records.stage import Stage, log_stage

RESULT_FILE, CLASSES_FILE = "segmentation.json", "per_class.csv"
CLASSES_PICTURE, SHEET = "per_class.png", "best_and_worst.png"
_SET_CHARS = 120  # of the name of a data set, in the name of a result


@dataclass(frozen=True)
class Asked:
    """What the command was asked for; None: as the run has it. out: where `evaluations/` goes."""

    checkpoint: Path
    data: str | None = None
    weights: str | None = None
    mode: str | None = None
    stride: int | None = None
    scales: tuple[float, ...] | None = None
    flip: bool = False
    name: str | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Opened:
    """All of it, checked: what `asked` means."""

    weights: Weights
    config: SegmentConfig
    data: DenseManifest
    folder: Path


def open_asked(asked: Asked) -> Opened:
    """Raises CheckpointError, ManifestError, DataError and ConfigError."""
    weights = find_weights(asked.checkpoint, asked.weights, "segment")
    tree = {**weights.meta.config, "evaluate": {**weights.meta.config["evaluate"]}}
    if asked.data is not None:
        tree["data"] = {**tree["data"], "path": asked.data}
    changes = {"mode": asked.mode, "stride_px": asked.stride, "scales": asked.scales, "flip": asked.flip or None}
    tree["evaluate"] |= {"every_epochs": 1} | {key: value for key, value in changes.items() if value is not None}
    try:
        config = SegmentConfig.model_validate(tree)
    except ValidationError as error:
        raise CheckpointError(f"it cannot be measured so: {error.errors()[0]['msg']}") from None
    data = open_dense(config)
    check_files(config.data.path, data, "val")
    if data.classes != weights.meta.synsets:
        raise CheckpointError(
            f"{config.data.path} has other classes than {weights.path} has learned "
            f"({_difference(data.classes, weights.meta.synsets)}): give a set of the same classes with --data"
        )
    measured = f"{data.name[:_SET_CHARS]}{_protocol(config)}"
    name = asked.name or folder_name(f"step-{weights.meta.step:08d}-{weights.which}-{measured}")
    check_name(name)
    run = asked.out.expanduser() if asked.out else weights.run
    return Opened(weights, config, data, run / EVALUATIONS / name)


def _difference(found: list[str], wanted: list[str]) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} against {len(wanted)}"
    label = next(label for label, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
    return f"label {label} is {found[label]!r}, was {wanted[label]!r}"


def _protocol(config: SegmentConfig) -> str:
    """In the name of a result: another protocol's takes no other's place."""
    asked = config.evaluate
    text = "" if asked.mode == "whole" else f"-slide{asked.stride_px}"
    text += "" if asked.scales == (1.0,) else "-x" + "+".join(f"{scale:g}" for scale in asked.scales)
    return text + ("-flip" if asked.flip else "")


def evaluate_segmentation(asked: Asked, ranks_here: int = 1) -> int:
    """Measure, write the result folder, print a table; returns the exit code. See `open_asked` for what is raised.

    ranks_here: processes to start on this host, where no launcher has started them.
    """
    opened = open_asked(asked)
    if ranks_here > 1 and "RANK" not in os.environ:
        return start_here(_arguments(asked), ranks_here)
    ranks, device = join({key: None if value is None else str(value) for key, value in vars(asked).items()})
    started = time.monotonic()
    pixels, loss, count, pictures = measure(opened, ranks, device)
    mine = (pictures, time.monotonic() - started)
    told = gather(mine) if ranks.count > 1 else [mine]
    if ranks.rank > 0:
        return 0
    results = {**summarised(pixels, loss, count), "ranks": ranks.count, "seconds": max(each for _, each in told)}
    table = _classes(opened, pixels)
    _print(opened, results, table)  # first: where the disk is full, hours have not been for nothing
    try:
        with atomic_folder(opened.folder) as folder:
            _write(folder, opened, results, table, kept([each for some, _ in told for each in some]))
    except OSError as error:
        raise CheckpointError(
            f"{opened.folder} cannot be written: {error.strerror or error}: give another folder with --out"
        ) from None
    Console().print(Text(str(opened.folder)), soft_wrap=True)
    _track(opened, results)
    return 0


def measure(opened: Opened, ranks: Ranks, device: torch.device) -> tuple[torch.Tensor, float, int, list[Shown]]:
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
        yield from tqdm(images, total=total, unit="image", desc="evaluate", disable=ranks.rank > 0)

    whole = confusion(
        *(net.to(device), counted(), config.evaluate, config.data.resolution, opened.data.num_classes, device),
        *(config.train.bf16_on(device.type), lambda sums: sum_over_ranks(sums.cpu()) if ranks.count > 1 else sums),
        look=look,
    )
    return *whole, pictures


def _classes(opened: Opened, pixels: torch.Tensor) -> list[dict[str, Any]]:
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


def _write(
    folder: Path, opened: Opened, results: dict[str, Any], table: list[dict[str, Any]], pictures: list[Shown]
) -> None:
    weights, config = opened.weights, opened.config
    content = {
        "format_version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {"path": str(weights.path), "step": weights.meta.step, "weights": weights.which},
        "data": {"path": config.data.path, "name": opened.data.name, "dataset_id": opened.data.dataset_id},
        "protocol": {**config.evaluate.model_dump(exclude={"every_epochs"}), "window_px": config.data.resolution},
        "results": results,
        "classes": table,
    }
    (folder / RESULT_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    (folder / CLASSES_FILE).write_text(text.getvalue(), encoding="utf-8")
    draw_classes(table, folder / CLASSES_PICTURE)
    draw_sheet(pictures, opened.data.classes, folder / SHEET)


def _print(opened: Opened, results: dict[str, Any], classes: list[dict[str, Any]]) -> None:
    console, table = Console(), Table()
    for column in ("mIoU %", "class accuracy %", "pixels %", "loss", "images"):
        table.add_column(column, justify="right")
    table.add_row(
        *(f"{results[key]:.2f}" for key in ("miou", "macc", "pixel_accuracy")),
        *(f"{results['val_loss']:.4f}", f"{results['val_samples']:.0f}"),
    )
    console.print(Text(f"{opened.weights.path} ({opened.weights.which}) on {opened.config.data.path}"), soft_wrap=True)
    console.print(table)
    known = sorted((row for row in classes if row["iou_percent"] is not None), key=lambda row: row["iou_percent"])
    worst = ", ".join(f"{row['class']} {row['iou_percent']:.1f}" for row in known[:5])
    console.print(Text(f"lowest: {worst}"), soft_wrap=True)
    if absent := int(results["classes_absent"]):
        console.print(Text(f"{absent} classes are in no image and in no prediction: they count in no mean"))


def _track(opened: Opened, results: dict[str, Any]) -> None:
    """Into MLflow, beside the run that the weights are of."""
    weights, run = opened.weights, opened.weights.run
    numbers = {key: float(value) for key, value in results.items()}
    params = {key: str(value) for key, value in opened.config.evaluate.model_dump(exclude={"every_epochs"}).items()}
    params |= {"data": opened.config.data.path, "weights": weights.which}
    tags = {"checkpoint": str(weights.path), "dataset": opened.data.name, "dataset_id": opened.data.dataset_id}
    name = f"evaluate {run.name}: {opened.folder.name}"
    measured = {f"{folder_name(opened.data.name[:_SET_CHARS])}{_protocol(opened.config)}_miou": numbers["miou"]}
    files = sorted(filter(Path.is_file, opened.folder.iterdir()))
    log_stage(run, Stage("evaluate", name, weights.meta.step, numbers, params, tags, files, results=measured))


def _arguments(asked: Asked) -> list[str]:
    """The command line of a rank."""
    plain = {key: value for key, value in vars(asked).items() if key not in ("checkpoint", "scales", "flip")}
    words = [f"--{key}={value}" for key, value in plain.items() if value is not None]
    words += ["--flip"] if asked.flip else []
    scales = [] if asked.scales is None else ["--scales", *map(str, asked.scales)]
    return ["evaluate-segment", str(asked.checkpoint), *words, *scales]
