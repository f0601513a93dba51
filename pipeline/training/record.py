"""What a run writes down beside its numbers and checkpoints: what it is, what made it, how it looks, how it ended."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_prep.labels.spaces import lemma
from data_prep.manifest import MANIFEST_NAME
from data_prep.storage import atomic_write
from pipeline.config.run import RunConfig
from pipeline.ranks.collectives import Ranks, gather
from pipeline.ranks.log_file import LogFile, say
from pipeline.records.console import print_summary
from pipeline.records.family import DataSet, Lineage
from pipeline.records.figures import CURVES, SHEET, draw_curves, draw_sheet
from pipeline.records.run_id import CONFIG_FILE, ID_FILE, LOG_FILE, SUMMARY_FILE
from pipeline.records.system import SystemSampler
from pipeline.records.tracking import Tracker
from pipeline.training.initial import local_init
from pipeline.training.task import images_of

GUARD_FILE, UNMATCHED = "guard.jsonl", "unmatched_classes.tsv"
_FILES = (CONFIG_FILE, LOG_FILE, SUMMARY_FILE, MANIFEST_NAME, GUARD_FILE)

MicroBatches = Iterator[tuple[Any, Any]]


class Nodes:
    """How busy the nodes are, by their names: the first rank of each one samples."""

    def __init__(self, ranks: Ranks, hosts: Sequence[str], run_dir: Path, stack: ExitStack) -> None:
        """hosts: of each rank. What has to be closed goes on `stack`."""
        self._name = hosts[ranks.rank] if ranks.rank < len(hosts) else os.uname().nodename
        self._ranks, self._sampler = ranks, None
        if self._name not in hosts[: ranks.rank]:
            self._sampler = SystemSampler(run_dir)
            stack.callback(self._sampler.close)

    def gather(self) -> dict[str, dict[str, float]]:
        """The numbers of each since the last call. A collective."""
        own = (self._name, self._sampler.read()) if self._sampler else None
        return dict(filter(None, gather(own) if self._ranks.count > 1 else [own]))


def begin(
    command: str,
    config: RunConfig,
    data: DataSet,
    first_step: int,
    origin: str,
    hosts: Sequence[str],
    stack: ExitStack,
) -> tuple[Tracker, LogFile]:
    """Write down what the run is, before its first step, on rank 0; returns its tracker, and the guard's ledger.

    origin: of its weights, in words. Raises ConfigError for an MLflow address that can never be reached.
    """
    with atomic_write(config.run_dir / CONFIG_FILE) as file:
        file.write(config.to_yaml().encode())
    data.save(config.run_dir)
    tags = {"stage": command, "dataset": data.name, "dataset_id": data.dataset_id, "origin": origin}
    lineage = Lineage(command, data, str(config.data.path), _run_of(local_init(config).checkpoint), tuple(hosts))
    tracker = stack.enter_context(Tracker(config, tags, first_step, lineage))
    ledger = LogFile(config.run_dir / GUARD_FILE)
    ledger.cut(lambda line: json.loads(line)["step"] <= first_step)
    return tracker, ledger


def _run_of(checkpoint: Path | None) -> Path | None:
    """The folder of the run that a checkpoint is of, if MLflow knows it."""
    if checkpoint is None:
        return None
    path = checkpoint.absolute()
    return next((folder for folder in (path, *path.parents[:3]) if (folder / ID_FILE).is_file()), None)


def with_sheet(micro_batches: MicroBatches, run_dir: Path, tracker: Tracker) -> MicroBatches:
    """The same, and of the first one a picture beside the run's log and in MLflow."""
    for number, (inputs, targets) in enumerate(micro_batches):
        if number == 0:
            try:
                draw_sheet(images_of(inputs), run_dir / SHEET)
                tracker.attach(run_dir / SHEET)
            except OSError as error:  # a full disk is no reason not to train
                say(f"warning: {run_dir / SHEET} could not be written: {error}", sys.stderr)
        yield inputs, targets


def write_unmatched(run_dir: Path, wnids: Sequence[str]) -> None:
    """Every class whose head row was not in the weights that a run starts from, with its words."""
    with atomic_write(run_dir / UNMATCHED) as file:
        file.write("".join(f"{wnid}\t{lemma(wnid)}\n" for wnid in wnids).encode())


def files(run_dir: Path) -> list[Path]:
    """What MLflow gets of a run folder at its end."""
    return [run_dir / name for name in (*_FILES, UNMATCHED, CURVES)]


def end(
    tracker: Tracker,
    command: str,
    config: RunConfig,
    dataset_id: str,
    metrics: Mapping[str, float],
    steps: int,
    seconds: float,
    checkpoint: Path | None,
) -> None:
    """The summary of a run that is done, its curves, and the end of its MLflow run; on rank 0."""
    summary = {
        "name": config.name,
        "stage": command,
        **metrics,
        "samples_seen": steps * config.train.global_batch,
        "seconds": round(seconds, 1),
        "mlflow_run_id": tracker.run_id,
        "checkpoint": str(checkpoint),
        "dataset_id": dataset_id,
    }
    run_dir = config.run_dir
    try:
        with atomic_write(run_dir / SUMMARY_FILE) as file:
            file.write(json.dumps(summary, indent=1).encode())
        draw_curves((run_dir / LOG_FILE).read_text().splitlines(), config.name, run_dir / CURVES)
    except (OSError, ValueError) as error:  # the run is done, and its checkpoint is on disk
        say(f"warning: {run_dir / SUMMARY_FILE} or {CURVES} could not be written: {error}", sys.stderr)
    tracker.finish("FINISHED", files(run_dir), results=metrics, checkpoint=checkpoint)
    print_summary(config, summary, tracker.mlflow.address)
