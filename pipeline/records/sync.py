"""MLflow gets what it was not reached for, from what a run folder holds."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.credentials import without_credentials
from data_prep.dense_set import load_set
from data_prep.manifest import MANIFEST_NAME
from pipeline.config.kinds import load_any
from pipeline.config.run import RunConfig
from pipeline.ranks.lifetime import exclusive, holder_of
from pipeline.records.address import check_address, missing_database
from pipeline.records.family import Lineage
from pipeline.records.figures import SHEET
from pipeline.records.journal import read_journal, read_unsent
from pipeline.records.run_id import CONFIG_FILE, LOG_FILE, read_id
from pipeline.records.stage import Stage, log_stage
from pipeline.records.tracking import Tracker

_LOGS = (LOG_FILE, "system.jsonl")
_FILES = (CONFIG_FILE, LOG_FILE, MANIFEST_NAME, SHEET)  # of a run whose end nobody wrote down
_POLL_SECONDS = 0.2


class SyncError(ValueError):
    """A run that MLflow cannot be told of, or does not take."""


def sync(run_dir: Path) -> str:
    """Tell MLflow all that the run folder holds; what was done, in words.

    Raises SyncError where a run is under way, cannot be read, or MLflow does not take it; RunBusyError; ConfigError.
    """
    if (holder := holder_of(run_dir)) is not None:
        raise SyncError(f"{holder} writes to it, and sends what waits itself: wait for its end")
    known = read_journal(run_dir)
    config = _config(run_dir, known)
    if read_id(run_dir).get("run_id") and (gone := missing_database(check_address(config))) is not None:
        raise SyncError(f"MLflow's database {gone}, which knows the run, is not there: put it back")
    last = max(_last_step(run_dir / name) for name in _LOGS)
    with ExitStack() as stack:
        stack.enter_context(exclusive(run_dir))
        tracker = Tracker(config, known.get("tags", {}), max(last, 1), _lineage(run_dir, known), training=False)
        with tqdm(desc="numbers sent", unit="", leave=False, disable=not sys.stderr.isatty()) as bar:
            while not tracker.wait(_POLL_SECONDS):
                bar.update(tracker.sent - bar.n)
        end = known.get("end") or {"status": "KILLED", "reason": "nobody wrote down its end", "files": _FILES}
        tracker.finish(
            end["status"],
            [run_dir / name for name in end.get("files", _FILES)],
            end.get("reason"),
            end.get("results"),
            Path(end["checkpoint"]) if end.get("checkpoint") else None,
            end.get("time"),
        )
        if not tracker.is_told:
            raise SyncError("MLflow has not got all of it: give the command again once that is mended")
    stages = read_unsent(run_dir)
    left = [name for name, stage in stages.items() if log_stage(run_dir, Stage.of(stage)) is None]
    if left:
        raise SyncError(f"MLflow did not take {', '.join(left)}: give the command again once that is mended")
    also = f" and {', '.join(stages)}" if stages else ""
    return f"{tracker.sent:,} numbers{also} sent; MLflow has all, {end['status']}: {tracker.mlflow.address}"


def _config(run_dir: Path, known: dict[str, Any]) -> RunConfig:
    """The run's own, for the folder as it is now, and the MLflow that it went to."""
    place = run_dir.absolute()
    here = {"output_root": str(place.parent), "name": place.name}
    config = load_any(run_dir / CONFIG_FILE, [f"{key}={json.dumps(value)}" for key, value in here.items()])
    uri = known.get("uri") or read_id(run_dir).get("uri")
    if uri and without_credentials(check_address(config)) != uri:
        config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    return config


def _lineage(run_dir: Path, known: dict[str, Any]) -> Lineage | None:
    if "stage" not in known:
        return None
    origin = known.get("origin")
    return Lineage(
        known["stage"],
        load_set(run_dir) if (run_dir / MANIFEST_NAME).is_file() else None,
        known.get("data", ""),
        Path(origin) if origin else None,
        tuple(known.get("hosts", ())),
    )


def _last_step(log: Path) -> int:
    """Of a log's lines; only the last line may be cut off. Raises SyncError."""
    steps = [0]
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise SyncError(f"{log}: line {number} of {len(lines)} is damaged: take it out") from None
    return max(steps)
