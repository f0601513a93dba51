"""A run's folder as it is reviewed: what stands there is read; what is missing, half written or damaged is not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.credentials import without_credentials
from pipeline.records.review_address import REVIEW_PORT
from pipeline.review.log import Log, read_log
from pipeline.review.mlflow_pages import page_of_run
from pipeline.review.timeline import Timeline, read_timeline

_FILE_BYTES = 64_000_000  # of a JSON or YAML file; dataset.json of ImageNet-22K has 2 MB
_VALUE_CHARS = 300
SCORES = {"segment": ("miou", "mIoU"), "detect": ("box_ap", "box AP")}  # by stage, which is the task; others: top-1
_CHECKPOINTS = 50


class ReviewError(ValueError):
    """There is nothing to review, or no server to do it with."""


@dataclass
class Run:
    """One run, without its log. `config`: flat, "train.epochs" -> value, as shown; `checkpoints`: newest last, as
    checkpoint.json says; `step`: the newest that was logged, of `steps` in all; `lines` of the log, `damaged` ones not
    among them; `last`: each metric's newest value; `images_per_second`: the median of what was logged.
    """

    path: Path
    name: str
    stage: str
    config: dict[str, str]
    step: int
    steps: int | None
    lines: int
    damaged: int
    last: dict[str, float]
    best_score: float | None  # the largest of `score`
    images_per_second: float | None
    timeline: Timeline
    summary: dict[str, Any]
    manifest: dict[str, Any]
    checkpoints: list[dict[str, Any]]
    mlflow: str | None
    global_batch: float | None

    @property
    def score(self) -> float | None:
        """What stands for how good it is, percent: top-1, of a segmentation the mIoU, of a detection the box AP."""
        return self.last.get(score_of(self.stage)[0])

    @property
    def state(self) -> str:
        """finished, stopped (the same command goes on), open (it runs, or was killed), or nothing logged."""
        if self.summary:
            return "finished"
        if not self.lines:
            return "nothing logged"
        told = [event.kind for event in self.timeline.events if event.kind in ("stopped", "resumed")]
        return "stopped" if told and told[-1] == "stopped" else "open"

    def event_count(self, kind: str) -> int:
        """How many events of a kind are on its time line."""
        return sum(event.kind == kind for event in self.timeline.events)


def score_of(stage: str) -> tuple[str, str]:
    """The metric of `Run.score`, and its name."""
    return SCORES.get(stage, ("top1", "top-1"))


def find_runs(paths: list[Path]) -> list[Path]:
    """The run folders among `paths`, and in the folders of runs among them, the oldest first. Raises ReviewError."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            hint = (
                "no run yet, `make pretrain` first" if path == Path("runs") else "name a run's folder, or one of runs"
            )
            raise ReviewError(f"there is no folder {path}: {hint}")
        inside = [path] if _is_run(path) else sorted(filter(_is_run, path.iterdir()), key=_began)
        if not inside:
            raise ReviewError(f"{path} has no run: `make pretrain` first, or name a run's folder, or one of runs")
        found |= dict.fromkeys(inside)
    return list(found)


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.yaml", "log.jsonl"))


def _began(path: Path) -> float:
    """When a run began: its first line, else its folder's time."""
    try:
        with open(path / "log.jsonl", "rb") as file:
            return float(json.loads(file.readline(10_000))["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return path.stat().st_mtime


def read_run(
    path: Path,
    port: int = REVIEW_PORT,
    advance: Callable[[int], object] = lambda read: None,
    name: str | None = None,
) -> tuple[Run, Log]:
    """Read a run's folder, and its log; never raises for what is in it.

    `advance` is told of bytes as they are read; `name` is shown in place of the run's own.
    """
    config = _flat(read_mapping(path / "config.yaml"))
    summary, manifest = read_mapping(path / "summary.json"), read_mapping(path / "dataset.json")
    batch = _number(config.get("train.global_batch"))
    log = read_log(path / "log.jsonl", advance)
    timeline = read_timeline(path, log, batch)
    stage = str(
        summary.get("stage")
        or config.get("task")
        or ("finetune" if config.get("init.checkpoint", "null") != "null" else "pretrain")
    )
    run = Run(
        path=path,
        name=(name or config.get("name") or path.name)[:_VALUE_CHARS],
        stage=stage[:40],
        config=config,
        step=int(log.steps[-1]) if len(log.steps) else 0,
        steps=_steps(log, _number(config.get("train.epochs"))),
        lines=len(log.steps),
        damaged=log.damaged,
        last={key: float(column.values[-1]) for key, column in log.columns.items()},
        best_score=log.largest(score_of(stage)[0]),
        images_per_second=log.median("images_per_second"),
        timeline=timeline,
        summary=summary,
        manifest=manifest,
        checkpoints=list(_checkpoints(path / "checkpoints")),
        mlflow=page_of_run(path, port),
        global_batch=batch,
    )
    return run, log


def _steps(log: Log, epochs: float | None) -> int | None:
    """Steps of the whole run: `epochs` times those of an epoch, by the newest line that says how many it has done."""
    column = log.columns.get("epoch")
    if column is None or not epochs or not column.values[-1] > 0 or math.isinf(column.values[-1]):
        return None
    per_epoch = round(float(log.steps[column.rows[-1]] / column.values[-1]))
    return int(per_epoch * epochs)


def _checkpoints(folder: Path) -> Iterator[dict[str, Any]]:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return
    links = {_target(folder / link): link for link in ("latest", "best")}
    for name in names[-_CHECKPOINTS:]:
        meta = read_mapping(folder / name / "checkpoint.json")
        if not meta:
            continue
        files = meta.get("files")
        sizes = [file.get("bytes", 0) for file in files.values()] if isinstance(files, dict) else []
        yield {
            "name": name,
            "link": links.get(name),
            "step": meta.get("step"),
            "updates": meta.get("updates"),
            "metrics": meta.get("metrics") if isinstance(meta.get("metrics"), dict) else {},
            "gigabytes": sum(size for size in sizes if isinstance(size, int)) / 1e9,
        }


def _target(link: Path) -> str | None:
    try:
        return link.readlink().name
    except OSError:
        return None


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping; empty where it cannot be read as that."""
    try:
        if path.stat().st_size > _FILE_BYTES or not path.is_file():
            return {}
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every key of a configuration as "section.key", with its value as it is shown; no credentials."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value and prefix.count(".") < 4:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[f"{prefix}{key}"[:_VALUE_CHARS]] = without_credentials(text)[:_VALUE_CHARS]
    return flat


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
