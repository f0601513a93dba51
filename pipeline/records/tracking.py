"""Where a run's numbers go: the console, `log.jsonl`, and MLflow. The only file that imports mlflow. Rank 0 only.

`log.jsonl` is the record; MLflow gets the same numbers with the same times. Where one of the three does not take them
(a server that is down, a full disk, a terminal that is gone) training goes on: the numbers wait and go with the next
ones, or at the end. So they do while a thread imports mlflow and reaches it: that takes seconds, and no step waits.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from data_prep.storage import atomic_write
from pipeline.config.load import Config
from pipeline.ranks.lifetime import ignore_sigterm
from pipeline.ranks.log_file import LogFile, say

if TYPE_CHECKING:
    import mlflow

_RETRY_SECONDS = 60.0  # between tries to reach a server that did not answer: each costs seconds
_BATCH = 500  # metrics a request may hold are limited by the server
_EVENTS = 1000  # shown in MLflow, where each new one sends all again
_REASON_CHARS = 500
_LAST_WORDS_SECONDS = 15.0


class _Metric(NamedTuple):
    """The fields of MLflow's, before mlflow is imported; timestamp in ms."""

    key: str
    value: float
    timestamp: int
    step: int


class Tracker:
    """One run's log. `start`, or the first numbers, begin to reach MLflow; nothing waits until that is done."""

    def __init__(self, config: Config, tags: Mapping[str, str], first_step: int) -> None:
        """Open the log of a run at `first_step`; a run folder that had an MLflow run goes on with it.

        Lines of `log.jsonl` past `first_step` come from a try that was killed after its last checkpoint: they are
        dropped, since the steps are run again. MLflow, which forgets nothing, keeps its values of those steps, and is
        not sent them twice.
        """
        self.config = config
        self._run_id: str | None = None
        # While it lives it alone talks to MLflow, and afterwards who logs does.
        self._starting = threading.Thread(target=self._reach_and_send, name="mlflow", daemon=True)
        self._new: deque[_Metric] = deque()  # not yet among those that wait to be sent
        self._id_file = config.run_dir / "mlflow_run.json"
        self._tags = dict(tags)
        self._complained = self._reached = self._finished = False
        self._retry_at = 0.0
        self._last_steps: dict[str, int] = {}  # of each metric, in MLflow, before this process
        root = config.output_root.resolve()
        self.uri = config.tracking.uri or f"sqlite:///{root / 'mlflow.db'}"
        self._artifacts = None if config.tracking.uri else (root / "mlartifacts").as_uri()
        self._log = LogFile(config.run_dir / "log.jsonl")
        kept = self._log.cut(lambda line: json.loads(line)["step"] <= first_step)
        # All that is kept: to a new MLflow run, and to one that goes on if it was not reached when they were logged.
        self._pending = [metric for line in kept for metric in _metrics(json.loads(line))]
        self._event_log = LogFile(config.run_dir / "events.txt")
        self._events = deque(
            self._event_log.cut(lambda line: first_step > 0 and _event_step(line) <= first_step), maxlen=_EVENTS
        )
        self._events_pending = bool(self._events)
        if first_step and self._id_file.exists():
            known = json.loads(self._id_file.read_text())
            if known["uri"] == self.uri:
                self._run_id = known["run_id"]
        self._goes_on = self._id_saved = self._run_id is not None

    @property
    def run_id(self) -> str | None:
        """MLflow's, or None as long as MLflow could not be reached; waits for the first try to reach it."""
        self.start()
        self._wait()
        return self._run_id

    def start(self) -> None:
        """Begin to reach MLflow; a second call does nothing."""
        if self._starting.ident is None:
            os.register_at_fork(before=self._wait)  # a child forked within an import would keep its locks for ever
            self._starting.start()

    def _wait(self) -> None:
        if self._starting.is_alive() and self._starting is not threading.current_thread():
            self._starting.join()

    def log(self, step: int, metrics: Mapping[str, float], line: str) -> None:
        """Record `metrics` at `step` everywhere; `line` is what the console shows."""
        record = {"time": round(time.time(), 3), "step": step}
        record |= {key: _round(value) for key, value in metrics.items()}
        self._log.append(json.dumps(record))
        say(line, sys.stdout)
        self._new.extend(_metrics(record))
        self._send()

    def event(self, step: int, line: str) -> None:
        """Tell what happened at `step` beside the numbers: on the console, in `events.txt` and in MLflow's artifact of
        that name.
        """
        say(f"step {step}  {line}", sys.stdout)
        self._events.append(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}  step {step}  {' '.join(line.split())}")
        self._event_log.append(self._events[-1])
        self._events_pending = True
        self._send()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if kind is not None:  # a run that ends well has said so with `finish`
            ignore_sigterm()
            reason = f"{kind.__name__}: {error}".removesuffix(": ")
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED", [self._log.path], reason)

    def finish(self, status: str, files: list[Path], reason: str | None = None) -> None:
        """Send what waits, end the MLflow run with `status` (FINISHED, FAILED, KILLED), attach those of `files` that
        exist. `reason` becomes its tag "stopped". A second call does nothing.
        """
        if self._finished:
            return
        self._finished = True
        self._log.flush()
        self._send(now=True)
        self._take_new()
        if self._run_id is None or self._pending:
            self._complain(f"{len(self._pending)} numbers of {self._log.path} did not reach it", last=True)
            return
        try:
            client = _mlflow().MlflowClient(self.uri)
            self._end(client, self._run_id, status, reason)
            for path in files:
                if path.exists():
                    client.log_artifact(self._run_id, str(path))
        except Exception as error:  # a tracking server must never fail a run that is done
            self._complain(str(error), last=True)

    def fail_from_thread(self, reason: str) -> None:
        """Mark the MLflow run as FAILED, with the tag "stopped", from another thread while the main thread hangs.

        Does what it can in 15 s and never raises; what hangs may be MLflow itself.
        """

        def fail() -> None:
            with suppress(Exception):
                if self._run_id is not None:
                    self._end(_mlflow().MlflowClient(self.uri), self._run_id, "FAILED", reason)

        with suppress(Exception):
            thread = threading.Thread(target=fail, name="last words", daemon=True)
            thread.start()
            thread.join(_LAST_WORDS_SECONDS)

    @staticmethod
    def _end(client: mlflow.MlflowClient, run_id: str, status: str, reason: str | None) -> None:
        if reason is not None:
            client.set_tag(run_id, "stopped", " ".join(reason.split())[:_REASON_CHARS])
        client.set_terminated(run_id, status)

    def _reach(self) -> None:
        """Create the MLflow run or go on with it. A server that is down is no reason not to train."""
        try:
            client = _mlflow().MlflowClient(self.uri)
            if self._goes_on:
                assert self._run_id is not None
                tags = client.get_run(self._run_id).data.tags
                client.update_run(self._run_id, status="RUNNING")
                if "stopped" in tags:
                    client.delete_tag(self._run_id, "stopped")
                client.set_tag(self._run_id, "restarts", int(tags.get("restarts", 0)) + 1)
            else:
                self._create(client)
            self._reached = True
            self._save_id()
        except Exception as error:  # mlflow raises its own, SQLAlchemy's and requests' errors alike
            self._complain(str(error))

    def _create(self, client: mlflow.MlflowClient) -> None:
        entities = _mlflow().entities
        if self._run_id is None:
            experiment = client.get_experiment_by_name(self.config.tracking.experiment)
            experiment_id = (
                experiment.experiment_id
                if experiment
                else client.create_experiment(self.config.tracking.experiment, artifact_location=self._artifacts)
            )
            self._run_id = client.create_run(experiment_id, run_name=self.config.name, tags=self._tags).info.run_id
        params = [entities.Param(key, str(value)[:500]) for key, value in _flat(self.config.model_dump(mode="json"))]
        client.log_batch(self._run_id, params=params, tags=[entities.RunTag("run_dir", str(self.config.run_dir))])

    def _send(self, now: bool = False) -> None:
        self.start()
        if now:
            self._wait()
        elif self._starting.is_alive() or time.monotonic() < self._retry_at:
            return
        self._reach_and_send()

    def _reach_and_send(self) -> None:
        if not self._reached:
            self._reach()
        if not self._reached:
            return
        assert self._run_id is not None
        self._save_id()
        self._take_new()
        try:
            client, metric_of = _mlflow().MlflowClient(self.uri), _mlflow().entities.Metric
            if self._goes_on:
                self._forget_what_is_known(client, self._run_id)
            while self._pending:
                client.log_batch(self._run_id, metrics=[metric_of(*metric) for metric in self._pending[:_BATCH]])
                self._last_steps = {metric.key: -1 for metric in self._pending[:_BATCH]} | self._last_steps
                del self._pending[:_BATCH]
                self._take_new()
            if self._events_pending:
                self._events_pending = False  # first: another event may come meanwhile
                client.log_text(self._run_id, "\n".join(list(self._events)) + "\n", "events.txt")
        except Exception as error:
            self._events_pending = bool(self._events)
            self._complain(str(error))

    def _take_new(self) -> None:
        while self._new:
            self._pending.append(self._new.popleft())

    def _save_id(self) -> None:
        if self._id_saved:
            return
        with suppress(OSError):  # a full disk: tried again with the next line
            with atomic_write(self._id_file) as file:
                file.write(json.dumps({"uri": self.uri, "run_id": self._run_id}).encode())
            self._id_saved = True

    def _forget_what_is_known(self, client: mlflow.MlflowClient, run_id: str) -> None:
        """Drop from what waits the steps that MLflow has from before this process: it would show them twice.

        Where it does not tell, they are sent: better twice than not at all.
        """
        for key in {metric.key for metric in self._pending} - self._last_steps.keys():
            try:
                history = client.get_metric_history(run_id, key)
            except Exception:
                break  # of one kind with the next keys; each try may cost seconds
            self._last_steps[key] = max((metric.step for metric in history), default=-1)
        self._pending = [metric for metric in self._pending if metric.step > self._last_steps.get(metric.key, -1)]

    def _complain(self, reason: str, last: bool = False) -> None:
        if last or not self._complained:
            first_line = reason.splitlines()[0][:300] if reason else "no reason given"
            then = "" if last else "training goes on, they are sent again later, and "
            say(
                f"warning: MLflow at {self.uri} did not take the run ({first_line}); {then}{self._log.path} has every "
                f"number",
                sys.stderr,
            )
        self._complained = True
        self._retry_at = time.monotonic() + _RETRY_SECONDS


def _event_step(line: str) -> int:
    return int(line.split("  step ")[1].split()[0])


def _mlflow() -> Any:
    """The package, imported where it is first asked for."""
    # Read when mlflow is imported: its defaults wait for minutes on a server that is down.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def _metrics(record: Mapping[str, float]) -> list[_Metric]:
    """MLflow's form of a line of log.jsonl."""
    stamp, step = round(record["time"] * 1000), int(record["step"])
    return [_Metric(key, float(value), stamp, step) for key, value in record.items() if key not in ("time", "step")]


def _round(value: float) -> float:
    return float(f"{value:.7g}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
