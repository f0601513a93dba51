"""A checkpoint measured, top to bottom: opened and checked, every image once over all ranks, one folder of results."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.checkpoints.files import CheckpointError
from pipeline.checkpoints.restore import Weights, at_resolution, find_weights, on_data, restore
from pipeline.config.load import Config
from pipeline.data.views import Batch
from pipeline.evaluation.accuracy import logits_of
from pipeline.evaluation.ranks import join, progress, start_here
from pipeline.evaluation.result import ResultFolder, check_name, folder_name, of_pair, spread
from pipeline.evaluation.scores import score
from pipeline.evaluation.sets import EvaluationSet, Selection, open_set, select
from pipeline.evaluation.summary import Images, confusion, name_of, per_class, reliability, results, worst_pairs
from pipeline.evaluation.wordnet import Noun, find_wordnet, read_nouns
from pipeline.ranks.collectives import Ranks, gather
from pipeline.ranks.rendezvous import RendezvousError
from pipeline.records.figures import draw_evaluation
from pipeline.records.stage import Stage, log_stage

_SET_CHARS = 120  # of the name of a data set, in the name of a result


@dataclass(frozen=True)
class Asked:
    """What the command was asked for. real: see `open_set`; out: where `evaluations/` goes, None: the run folder."""

    checkpoint: Path
    data: str | None = None
    weights: str | None = None
    resolution: int | None = None
    real: str | None = None
    name: str | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Opened:
    """All of it, checked: what `asked` means. measured: the set and how, as in the name that a result has by itself."""

    weights: Weights
    config: Config
    scored: EvaluationSet
    selection: Selection
    run: Path
    name: str
    measured: str


def open_asked(asked: Asked) -> Opened:
    """Raises CheckpointError, ManifestError, DataError, ConfigError and LabelError."""
    weights = find_weights(asked.checkpoint, asked.weights)
    meta = weights.meta
    config = Config.model_validate(_configured(meta.config, asked))
    scored = open_set(config, asked.data, asked.real)
    run = asked.out.expanduser() if asked.out else weights.run
    measured = _measured(scored, asked)
    name = asked.name or folder_name(f"step-{meta.step:08d}-{weights.which}-{measured}")
    check_name(name)
    _nouns()
    return Opened(weights, config, scored, select(meta.synsets, scored), run, name, measured)


def _measured(scored: EvaluationSet, asked: Asked) -> str:
    """On what, by a name: another protocol's result takes no other's place."""
    real = "-real" if scored.labels is not None else ""
    return f"{scored.name[:_SET_CHARS]}{real}" + ("" if asked.resolution is None else f"-{asked.resolution}px")


def _configured(tree: dict[str, Any], asked: Asked) -> dict[str, Any]:
    tree = tree if asked.data is None else on_data(tree, asked.data)
    return tree if asked.resolution is None else at_resolution(tree, asked.resolution)


def _nouns() -> dict[str, Noun] | None:
    """WordNet's, where it is installed; read once."""
    path = find_wordnet()
    return None if path is None else read_nouns(path)


def evaluate_checkpoint(asked: Asked, ranks_here: int = 1, check: bool = False) -> int:
    """Measure, write the result folder, print a table; returns the exit code. See `open_asked` for what is raised.

    ranks_here: processes to start on this host, where no launcher has started them; check: only look whether it can be.
    """
    opened = open_asked(asked)
    if check:
        return 0
    if ranks_here > 1 and "RANK" not in os.environ:
        return start_here(_arguments(asked), ranks_here)
    ranks, device = join({key: None if value is None else str(value) for key, value in vars(asked).items()})
    with ExitStack() as stack:
        folder = stack.enter_context(ResultFolder(opened.run, opened.name)) if ranks.rank == 0 else None
        parts, seconds = measure(opened, ranks, device)
        told = _of_all(ranks, (parts, seconds))
        if folder is None:
            return 0
        images = Images.of([part for each, _ in told for part in each])
        expected = opened.scored.size if opened.scored.labels is None else int((opened.scored.labels[:, 0] >= 0).sum())
        if len(np.unique(images.sample)) != expected or len(images.sample) != expected:
            raise CheckpointError(
                f"{len(images.sample):,} images were scored of the {expected:,} of {opened.scored.path}, which has "
                f"changed meanwhile: evaluate again"
            )
        content = _content(opened, images, ranks, max(each for _, each in told), device)
        _print(opened, content)  # first: where the disk is full, hours have not been for nothing
        _write(folder, opened, images, content)
    Console().print(Text(str(folder.final)), soft_wrap=True)
    _track(opened, content, folder.final)
    return 0


def _of_all(ranks: Ranks, mine: Any) -> list[Any]:
    if ranks.count == 1:
        return [mine]
    try:
        return gather(mine)
    except RuntimeError as error:  # gloo's
        raise RendezvousError(
            f"another rank of this evaluation has ended before its part was done: evaluate again "
            f"({' '.join(str(error).split())[:120]})"
        ) from None


@torch.inference_mode()
def measure(opened: Opened, ranks: Ranks, device: torch.device) -> tuple[list[tuple[np.ndarray, ...]], float]:
    """(sample ids and `Scored` of each of this rank's batches, seconds they took)."""
    model, scored = restore(opened.weights, opened.config).to(device), opened.scored
    bf16 = opened.config.train.bf16_on(device.type)
    parts: list[tuple[np.ndarray, ...]] = []
    mine = len(range(ranks.rank, scored.size, ranks.count))
    started = time.monotonic()
    with progress(mine, ranks) as bar:
        for batch in _labelled(scored.batches(ranks), scored.labels):
            bar.update(len(batch.samples))
            keep = (batch.labels if batch.labels.ndim == 1 else batch.labels[:, 0]) >= 0
            logits = opened.selection(logits_of(model, batch, device, bf16))[keep.to(device)]
            found = score(logits, batch.labels[keep].to(device))
            parts.append((batch.samples[keep].numpy(), *(value.numpy() for value in found)))
    return parts, time.monotonic() - started


def _labelled(batches: Iterator[Batch], labels: np.ndarray | None) -> Iterator[Batch]:
    for batch in batches:
        yield batch if labels is None else batch._replace(labels=torch.from_numpy(labels[batch.samples.numpy()]))


def _content(opened: Opened, images: Images, ranks: Ranks, seconds: float, device: torch.device) -> dict[str, Any]:
    """evaluation.json, but for what comes with pictures."""
    weights, config, scored = opened.weights, opened.config, opened.scored
    meta = weights.meta
    found = results(images, scored.labels is not None)
    nouns = _nouns()
    return {
        "name": opened.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {
            "path": str(weights.path),
            "run": weights.run.name,
            "step": meta.step,
            "samples_seen": meta.samples_seen,
            "weights": weights.which,
            "model": meta.model_name,
            "num_classes": meta.num_classes,
            "dataset_id": meta.dataset_id,
        },
        "data": {
            "path": scored.path,
            "name": scored.name,
            "dataset_id": scored.dataset_id,
            "labels": "single" if scored.labels is None else "real",
            "images": len(images.sample),
            "left_out": scored.size - len(images.sample),
            "classes": len(scored.synsets),
            "unmatched": opened.selection.unmatched,
        },
        "protocol": {
            "resolution": config.data.resolution,
            "resize": config.evaluate.resize,
            "crop_ratio": config.evaluate.crop_ratio,
            "interpolation": "bicubic",
            "precision": "bf16" if config.train.bf16_on(device.type) else "fp32",
        },
        "results": {
            **found,
            "ranks": ranks.count,
            "seconds": seconds,
            "images_per_second": scored.size / seconds,
        },
        "reliability": reliability(images),
        "confusion": confusion(images, scored.synsets, nouns),
    }


def _write(folder: ResultFolder, opened: Opened, images: Images, content: dict[str, Any]) -> None:
    scored = opened.scored
    try:
        content["worst_pairs"] = [
            {**entry, "pictures": folder.pictures(scored, images, of_pair(images, label, other))}
            for label, other, entry in worst_pairs(images, scored.synsets)
        ]
        content["samples"] = folder.pictures(scored, images, spread(images))
        folder.write(content, per_class(images, scored.synsets))
        draw_evaluation(content, folder.path)
    except OSError as error:
        raise folder.refused(error) from None


def _print(opened: Opened, content: dict[str, Any]) -> None:
    console, found, scored = Console(), content["results"], opened.scored
    table = Table()
    for column in ("top-1 %", "top-5 %", "loss", "images"):
        table.add_column(column, justify="right")
    loss = "" if found["loss"] is None else f"{found['loss']:.4f}"
    table.add_row(f"{found['top1_percent']:.2f}", f"{found['top5_percent']:.2f}", loss, f"{found['images']:.0f}")
    # not the table's title, which would be folded to its width
    console.print(Text(f"{opened.weights.path} ({opened.weights.which}) on {scored.path}"), soft_wrap=True)
    console.print(table)
    left, ece = scored.size - found["images"], "-" if found["ece"] is None else f"{found['ece']:.4f}"
    lines = [
        f"tied top-1 {found['tied_top1_percent']:.2f} %, ECE {ece}, among {len(scored.synsets):,} "
        f"classes, {found['images_per_second']:,.0f} images/s on {found['ranks']} rank{'s' * (found['ranks'] > 1)}",
        *([f"{left:,} images without a label in ReaL are left out"] if left else []),
    ]
    if unmatched := opened.selection.unmatched:
        names = ", ".join(f"{wnid} ({name_of(wnid)})" for wnid in unmatched[:5])
        more = f" and {len(unmatched) - 5:,} more" if len(unmatched) > 5 else ""
        lines.append(f"the head lacks {names}{more}: their images count as wrong")
    if content["confusion"] is None:
        lines.append("no confusion by groups: that takes WordNet (`apt-get install wordnet-base`)")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _track(opened: Opened, content: dict[str, Any], folder: Path) -> None:
    """Into MLflow, beside the run that the weights are of."""
    numbers = {name: value for name, value in content["results"].items() if isinstance(value, int | float)}
    told = {**content["data"], **content["protocol"], "weights": opened.weights.which}
    params = {name: str(value) for name, value in told.items() if not isinstance(value, list)}
    tags = {"checkpoint": str(opened.weights.path), "dataset": opened.scored.name}
    if opened.scored.dataset_id is not None:
        tags["dataset_id"] = opened.scored.dataset_id
    run, step = opened.weights.run, opened.weights.meta.step
    name = f"evaluate {run.name}: {opened.name}"
    results = {f"{opened.measured}_{key}": numbers[key] for key in ("top1_percent", "top5_percent")}
    files = sorted(filter(Path.is_file, folder.iterdir()))
    log_stage(run, Stage("evaluate", name, step, numbers, params, tags, files, results=results))


def _arguments(asked: Asked) -> list[str]:
    """The command line of a rank."""
    options = {key: value for key, value in vars(asked).items() if key != "checkpoint" and value is not None}
    return ["evaluate", str(asked.checkpoint), *(f"--{key}={value}" for key, value in options.items())]
