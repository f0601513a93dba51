"""Where a run's numbers go: the console, `log.jsonl`, and MLflow. The only file that imports mlflow. Rank 0 only.

`log.jsonl` is the record; MLflow gets the same numbers with the same times. Where MLflow does not answer, training goes
on: the numbers wait and are sent with the next ones, or at the end.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

# Read when mlflow is imported: its defaults wait for minutes on a server that is down.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
import mlflow
from mlflow.entities import Metric, Param, RunTag

from data_prep.manifest import atomic_write
from pipeline.config import Config
from pipeline.lifetime import ignore_sigterm

_RETRY_SECONDS = 60.0  # between tries to reach a server that did not answer: each costs seconds
_BATCH = 500  # metrics a request may hold are limited by the server


class Tracker:
    """One run's log. `run_id` is MLflow's, or None as long as MLflow could not be reached."""

    def __init__(self, config: Config, tags: Mapping[str, str], first_step: int) -> None:
        """Open the log of a run at `first_step`; a run folder that had an MLflow run goes on with it.

        Lines of `log.jsonl` past `first_step` come from a try that was killed after its last checkpoint: they are
        dropped, since the steps are run again.
        """
        self.config = config
        self.run_id: str | None = None
        self._id_file = config.run_dir / "mlflow_run.json"
        self._tags = dict(tags)
        self._pending: list[Metric] = []
        self._complained = False
        self._retry_at = 0.0
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        root = config.output_root.resolve()
        self.uri = config.tracking.uri or f"sqlite:///{root / 'mlflow.db'}"
        self._artifacts = None if config.tracking.uri else (root / "mlartifacts").as_uri()
        self._path = config.run_dir / "log.jsonl"
        self._drop_lines_after(first_step)
        if first_step and self._id_file.exists():
            known = json.loads(self._id_file.read_text())
            if known["uri"] == self.uri:
                self.run_id = known["run_id"]
        if self.run_id is None:  # a new MLflow run: what the run has logged so far goes there too
            self._pending = [metric for line in self._lines() for metric in _metrics(line)]
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by finish)
        self._reach()

    def log(self, step: int, metrics: Mapping[str, float], line: str) -> None:
        """Record `metrics` at `step` everywhere; `line` is what the console shows."""
        record = {"time": round(time.time(), 3), "step": step}
        record |= {key: _round(value) for key, value in metrics.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        print(line, flush=True)
        self._pending += _metrics(record)
        self._send()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # a run that ends well has said so with `finish`
            ignore_sigterm()
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED", [self._path])

    def finish(self, status: str, files: list[Path]) -> None:
        """Send what waits, attach `files` to the MLflow run, and end it with `status` (FINISHED, FAILED, KILLED)."""
        self._send(now=True)
        self._file.close()
        if self.run_id is None or self._pending:
            self._complain(f"{len(self._pending)} numbers of {self._path} did not reach MLflow")
            return
        try:
            client = mlflow.MlflowClient(self.uri)
            for path in files:
                client.log_artifact(self.run_id, str(path))
            client.set_terminated(self.run_id, status)
        except Exception as error:  # a tracking server must never fail a run that is done
            self._complain(str(error))

    def _reach(self) -> None:
        """Open or create the MLflow run. A server that is down is no reason not to train."""
        try:
            client = mlflow.MlflowClient(self.uri)
            if self.run_id is not None:
                client.update_run(self.run_id, status="RUNNING")
                return
            experiment = client.get_experiment_by_name(self.config.tracking.experiment)
            experiment_id = (
                experiment.experiment_id
                if experiment
                else client.create_experiment(self.config.tracking.experiment, artifact_location=self._artifacts)
            )
            run = client.create_run(experiment_id, run_name=self.config.name, tags=self._tags)
            self.run_id = run.info.run_id
            with atomic_write(self._id_file) as file:
                file.write(json.dumps({"uri": self.uri, "run_id": self.run_id}).encode())
            params = [Param(key, str(value)[:500]) for key, value in _flat(self.config.model_dump(mode="json"))]
            client.log_batch(self.run_id, params=params, tags=[RunTag("run_dir", str(self.config.run_dir))])
        except Exception as error:  # mlflow raises its own, SQLAlchemy's and requests' errors alike
            self._complain(str(error))

    def _send(self, now: bool = False) -> None:
        if time.monotonic() < self._retry_at and not now:
            return
        if self.run_id is None:
            self._reach()
        if self.run_id is None:
            return
        try:
            client = mlflow.MlflowClient(self.uri)
            while self._pending:
                client.log_batch(self.run_id, metrics=self._pending[:_BATCH])
                del self._pending[:_BATCH]
        except Exception as error:
            self._complain(str(error))

    def _complain(self, reason: str) -> None:
        if not self._complained:
            first_line = reason.splitlines()[0][:300] if reason else "no reason given"
            print(
                f"warning: MLflow at {self.uri} did not take the run ({first_line}); training goes on, "
                f"{self._path} has every number and they are sent again later",
                file=sys.stderr,
                flush=True,
            )
        self._complained = True
        self._retry_at = time.monotonic() + _RETRY_SECONDS

    def _drop_lines_after(self, step: int) -> None:
        kept = [line for line in self._lines() if line["step"] <= step]
        with atomic_write(self._path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    def _lines(self) -> list[dict[str, float]]:
        if not self._path.exists():
            return []
        lines = []
        for text in self._path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:  # the last line of a killed run may be cut
                break
        return lines


def _metrics(record: Mapping[str, float]) -> list[Metric]:
    """MLflow's form of a line of log.jsonl."""
    stamp, step = round(record["time"] * 1000), int(record["step"])
    return [Metric(key, float(value), stamp, step) for key, value in record.items() if key not in ("time", "step")]


def _round(value: float) -> float:
    return float(f"{value:.7g}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
