"""A segmentation or a detection measured: opened and checked, on all ranks, a folder of results."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from data_prep.dense_set import DenseManifest
from data_prep.storage import atomic_folder
from pipeline.checkpoints.files import CheckpointError
from pipeline.checkpoints.restore import Weights, find_weights
from pipeline.config.load import explained
from pipeline.config.run import RunConfig
from pipeline.dense.opened import check_files
from pipeline.evaluation.ranks import join, start_here
from pipeline.evaluation.result import EVALUATIONS, check_name, folder_name
from pipeline.ranks.collectives import Ranks, gather
from pipeline.records.stage import Stage, log_stage

CLASSES_FILE, CLASSES_PICTURE, SHEET = "per_class.csv", "per_class.png", "best_and_worst.png"
_SET_CHARS = 120  # of the name of a data set, in the name of a result
_Config = TypeVar("_Config", bound=RunConfig)
_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Asked:
    """What the command was asked for; None: as the run has it. out: where `evaluations/` goes."""

    checkpoint: Path
    data: str | None = None
    weights: str | None = None
    flip: bool = False
    name: str | None = None
    out: Path | None = None

    def words(self) -> list[str]:
        """The options on a command line."""
        found: list[str] = []
        for key, value in vars(self).items():
            if value is True:
                found.append(f"--{key}")
            elif isinstance(value, tuple):
                found += [f"--{key}", *map(str, value)]
            elif key != "checkpoint" and value is not None and value is not False:
                found.append(f"--{key}={value}")
        return found


@dataclass(frozen=True)
class Opened(Generic[_Config]):
    """All of it, checked: what `Asked` means. protocol: how it differs from the plain one, in the result's name."""

    weights: Weights
    config: _Config
    data: DenseManifest
    folder: Path
    protocol: str


class Measured(NamedTuple):
    """What is told of a whole split: numbers by name; a row for each class; what else goes into the result file; the
    console's tables; pictures.
    """

    results: dict[str, Any]
    classes: list[dict[str, Any]]
    more: dict[str, Any]
    show: Callable[[Console], None]
    draw: Callable[[Path], None]


class Kind(NamedTuple, Generic[_Config]):
    """What a task's command differs in.

    task: as the configuration has it; open_set: the data to measure on; protocol: see `Opened`; result_file:
    of the folder; score: the result that stands for all.
    """

    task: str
    config: type[_Config]
    open_set: Callable[[_Config], DenseManifest]
    protocol: Callable[[_Config], str]
    result_file: str
    score: str


def open_asked(kind: Kind[_Config], asked: Asked, changes: Mapping[str, Any]) -> Opened[_Config]:
    """`changes`: of the section `evaluate`; None where the run's own holds.

    Raises CheckpointError, ManifestError, DataError and ConfigError.
    """
    weights = find_weights(asked.checkpoint, asked.weights, kind.task)
    tree = {**weights.meta.config, "evaluate": {**weights.meta.config["evaluate"]}}
    if asked.data is not None:
        tree["data"] = {**tree["data"], "path": asked.data}
    tree["evaluate"] |= {"every_epochs": 1} | {key: value for key, value in changes.items() if value is not None}
    try:
        config = kind.config.model_validate(tree)
    except ValidationError as error:
        told = "; ".join(explained(error, weights.path, kind.config))
        raise CheckpointError(f"it cannot be measured so: {told}") from None
    data = kind.open_set(config)
    check_files(config.data.path, data, "val")
    if data.classes != weights.meta.synsets:
        raise CheckpointError(
            f"{config.data.path} has other classes than {weights.path} has learned "
            f"({_difference(data.classes, weights.meta.synsets)}): give a set of the same classes with --data"
        )
    protocol = kind.protocol(config)
    measured = f"{data.name[:_SET_CHARS]}{protocol}"
    name = asked.name or folder_name(f"step-{weights.meta.step:08d}-{weights.which}-{measured}")
    check_name(name)
    run = asked.out.expanduser() if asked.out else weights.run
    return Opened(weights, config, data, run / EVALUATIONS / name, protocol)


def _difference(found: list[str], wanted: list[str]) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} against {len(wanted)}"
    label = next(label for label, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
    return f"label {label} is {found[label]!r}, was {wanted[label]!r}"


def measure_on_ranks(
    kind: Kind[_Config],
    asked: Asked,
    opened: Opened[_Config],
    ranks_here: int,
    measure: Callable[[Opened[_Config], Ranks, torch.device], _Part],
    whole: Callable[[Opened[_Config], Sequence[_Part]], Measured],
) -> int:
    """Each rank's part, then on rank 0 the whole: printed, written, told to MLflow; returns the exit code.

    ranks_here: processes to start on this host, where no launcher has started them.
    """
    if ranks_here > 1 and "RANK" not in os.environ:
        return start_here([f"evaluate-{kind.task}", str(asked.checkpoint), *asked.words()], ranks_here)
    ranks, device = join({key: None if value is None else str(value) for key, value in vars(asked).items()})
    started = time.monotonic()
    mine = (measure(opened, ranks, device), time.monotonic() - started)
    told = gather(mine) if ranks.count > 1 else [mine]
    if ranks.rank > 0:
        return 0
    found = whole(opened, [part for part, _ in told])
    found.results.update(ranks=ranks.count, seconds=max(seconds for _, seconds in told))
    console = Console()
    # First: where the disk is full, hours have not been for nothing.
    console.print(Text(f"{opened.weights.path} ({opened.weights.which}) on {opened.config.data.path}"), soft_wrap=True)
    found.show(console)
    try:
        with atomic_folder(opened.folder) as folder:
            _write(folder, kind, opened, found)
    except OSError as error:
        raise CheckpointError(
            f"{opened.folder} cannot be written: {error.strerror or error}: give another folder with --out"
        ) from None
    console.print(Text(str(opened.folder)), soft_wrap=True)
    _track(kind, opened, found.results)
    return 0


def _write(folder: Path, kind: Kind[_Config], opened: Opened[_Config], found: Measured) -> None:
    weights, config = opened.weights, opened.config
    content = {
        "format_version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {"path": str(weights.path), "step": weights.meta.step, "weights": weights.which},
        "data": {"path": config.data.path, "name": opened.data.name, "dataset_id": opened.data.dataset_id},
        "protocol": config.evaluate.model_dump(exclude={"every_epochs"}),
        "results": found.results,
        "classes": found.classes,
        **found.more,
    }
    (folder / kind.result_file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(found.classes[0]))
    writer.writeheader()
    writer.writerows(found.classes)
    (folder / CLASSES_FILE).write_text(text.getvalue(), encoding="utf-8")
    found.draw(folder)


def _track(kind: Kind[_Config], opened: Opened[_Config], results: Mapping[str, Any]) -> None:
    """Into MLflow, beside the run that the weights are of."""
    weights, run = opened.weights, opened.weights.run
    numbers = {key: float(value) for key, value in results.items()}
    params = {key: str(value) for key, value in opened.config.evaluate.model_dump(exclude={"every_epochs"}).items()}
    params |= {"data": opened.config.data.path, "weights": weights.which}
    tags = {"checkpoint": str(weights.path), "dataset": opened.data.name, "dataset_id": opened.data.dataset_id}
    name = f"evaluate {run.name}: {opened.folder.name}"
    measured = f"{folder_name(opened.data.name[:_SET_CHARS])}{opened.protocol}_{kind.score}"
    files = sorted(filter(Path.is_file, opened.folder.iterdir()))
    score = {measured: numbers[kind.score]}
    log_stage(run, Stage("evaluate", name, weights.meta.step, numbers, params, tags, files, results=score))
