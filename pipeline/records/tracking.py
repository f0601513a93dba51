"""Where a run's numbers go: the console, `log.jsonl`, and MLflow. Rank 0 only.

`log.jsonl` is the record; MLflow gets the same numbers with the same times. Where one of the three does not take them
(a server that is down, a full disk, a terminal that is gone) training goes on: the numbers wait and go with the next
ones, or at the end. A thread imports mlflow and sends: that takes seconds now and then, and no step waits.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from data_prep.credentials import without_credentials
from pipeline.config.run import RunConfig
from pipeline.ranks.lifetime import ignore_sigterm
from pipeline.ranks.log_file import LogFile, say
from pipeline.records.family import Lineage
from pipeline.records.journal import write_journal
from pipeline.records.mlflow_run import Metric, MlflowRun, is_permanent
from pipeline.records.sender import Sender

_EVENTS = 1000  # shown in MLflow, where each new one sends all again
_LAST_WORDS_SECONDS = 15.0
_LATER = ": `python -m pipeline sync-tracking` sends it later"


class Tracker:
    """One run's log. `start`, or the first numbers, begin to reach MLflow; nothing waits until that is done."""

    def __init__(
        self,
        config: RunConfig,
        tags: Mapping[str, str],
        first_step: int,
        lineage: Lineage | None = None,
        training: bool = True,
    ) -> None:
        """Open the log of a run at `first_step`; a run folder that had an MLflow run goes on with it. training: false
        where it is over, and MLflow is only told.

        Lines of `log.jsonl` past `first_step` come from a try that was killed after its last checkpoint: they are
        dropped, since the steps are run again. MLflow, which forgets nothing, keeps its values of those steps, and is
        not sent them twice. Raises ConfigError for an MLflow address that can never be reached.
        """
        self.mlflow = MlflowRun(config, tags, first_step, lineage, training)
        self.sent, self.is_told, self._training = (
            0,
            False,
            training,
        )  # numbers that MLflow took; it has all, and the end
        self._sender = Sender(self._reach_and_send)  # talks to MLflow as long as it lives, alone
        self._new: deque[Metric] = deque()  # not yet among those that wait to be sent
        self._complained = self._reached = self._finished = False
        self._last_error: Exception | None = None
        self._log = LogFile(config.run_dir / "log.jsonl")
        self._system_log = LogFile(config.run_dir / "system.jsonl")
        logs = (self._log, self._system_log)
        kept = [line for log in logs for line in log.cut(lambda line: json.loads(line)["step"] <= first_step)]
        # All that is kept: to a new MLflow run, and to one that goes on if it was not reached when they were logged.
        self._pending = [metric for line in kept for metric in _metrics(json.loads(line))]
        self._files: deque[Path] = deque()
        self._event_log = LogFile(config.run_dir / "events.txt")
        self._events = deque(
            self._event_log.cut(lambda line: first_step > 0 and _event_step(line) <= first_step), maxlen=_EVENTS
        )
        self._events_pending = bool(self._events)

    @property
    def run_id(self) -> str | None:
        """MLflow's, or None as long as MLflow could not be reached; waits for the first try to reach it."""
        self._sender.wait_for_first()
        return self.mlflow.id

    def start(self) -> None:
        """Begin to reach MLflow; a second call does nothing."""
        self._sender.start()

    def wait(self, seconds: float) -> bool:
        """Wait for the first try to reach MLflow and send, so long at most; whether it is over."""
        return self._sender.wait_for_first(seconds)

    def flush(self) -> None:
        """Wait until all that is logged has been sent, or could not be."""
        self._sender.flush()

    def log(self, step: int, metrics: Mapping[str, float], line: str) -> None:
        """Record `metrics` at `step` everywhere; `line` is what the console shows."""
        record = {"time": round(time.time(), 3), "step": step}
        record |= {key: _round(value) for key, value in metrics.items()}
        self._log.append(json.dumps(record))
        say(line, sys.stdout)
        self._new.extend(_metrics(record))
        self._sender.start()
        self._sender.put_down()

    def log_system(self, step: int, nodes: Mapping[str, Mapping[str, float]]) -> None:
        """Record how busy each node was until `step`: in `system.jsonl` and MLflow, by the node's name."""
        record: dict[str, float] = {"time": round(time.time(), 3), "step": step}
        for node, numbers in nodes.items():
            record |= {f"system/{node}/{name}": _round(value) for name, value in numbers.items()}
        self._system_log.append(json.dumps(record))
        self._new.extend(_metrics(record))
        self._sender.put_down()

    def attach(self, path: Path) -> None:
        """Send a file of the run folder to MLflow, under its name."""
        self._files.append(path)
        self._sender.put_down()

    def event(self, step: int, line: str) -> None:
        """Tell what happened at `step` beside the numbers: on the console, in `events.txt` and in MLflow's artifact of
        that name.
        """
        say(f"step {step}  {line}", sys.stdout)
        line = without_credentials(" ".join(line.split()))
        self._events.append(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}  step {step}  {line}")
        self._event_log.append(self._events[-1])
        self._events_pending = True
        self._sender.put_down()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if kind is not None:  # a run that ends well has said so with `finish`
            ignore_sigterm()
            reason = f"{kind.__name__}: {error}".removesuffix(": ")
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED", [self._log.path], reason)

    def finish(
        self,
        status: str,
        files: list[Path],
        reason: str | None = None,
        results: Mapping[str, float] | None = None,
        checkpoint: Path | None = None,
        ended: int | None = None,
    ) -> None:
        """Send what waits, end the MLflow run with `status` (FINISHED, FAILED, KILLED), attach those of `files` that
        exist. `reason` becomes its tag "stopped"; `results` stand at the experiment's parent run too; `checkpoint`
        is named, and stays where it is; `ended`: Unix time in ms, now by default. A second call does nothing.
        """
        if self._finished:
            return
        self._finished = True
        self._log.flush()
        ended = round(time.time() * 1000) if ended is None else ended
        names = [file.name for file in (*files, *self._files.copy())]
        self._note_end(status, reason, names, results, checkpoint, ended)
        self._sender.close()
        self._take_new()
        if not self._reached or self._pending:
            unsent = f"{len(self._pending)} numbers did not reach it"
            self._complain(self._last_error or OSError(unsent), last=True)
            return
        try:
            self.mlflow.end(status, reason, files, results, checkpoint, ended)
            self.is_told = True
        except Exception as error:  # a tracking server must never fail a run that is done
            self._complain(error, last=True)

    def fail_from_thread(self, reason: str) -> None:
        """Mark the MLflow run as FAILED, with the tag "stopped", from another thread while the main thread hangs.

        Does what it can in 15 s and never raises; what hangs may be MLflow itself.
        """

        def fail() -> None:
            with suppress(Exception):
                self._note_end("FAILED", reason, [self._log.path.name], None, None, round(time.time() * 1000))
                if self.mlflow.id is not None:
                    self.mlflow.end("FAILED", reason)

        with suppress(Exception):
            thread = threading.Thread(target=fail, name="last words", daemon=True)
            thread.start()
            thread.join(_LAST_WORDS_SECONDS)

    def _reach_and_send(self) -> bool:
        """Create the MLflow run or go on with it, and send what waits. That it is down is no reason not to train."""
        for _ in range(2):
            try:
                if not self._reached:
                    self.mlflow.note()
                    if self.mlflow.goes_on and self.mlflow.is_gone():
                        self._begin_anew()
                    self.mlflow.open()
                    self._reached = True
                self.mlflow.save_id()
                self._send_what_waits()
                return True
            except Exception as error:  # mlflow raises its own, SQLAlchemy's and requests' errors alike
                failure = error
            with suppress(Exception):
                if is_permanent(failure) and self._reached and self.mlflow.is_gone():
                    self._begin_anew()
                    continue
            self._complain(failure)
            return False
        return False

    def _send_what_waits(self) -> None:
        self._take_new()
        self._pending = self.mlflow.new_to_it(self._pending)
        while before := len(self._pending):
            self.mlflow.send(self._pending)
            self.sent += before - len(self._pending)
            self._take_new()
        while self._files:
            if self._files[0].exists():
                self.mlflow.send_file(self._files[0])
            self._files.popleft()
        if self._events_pending:
            self._events_pending = False  # first: another event may come meanwhile
            try:
                self.mlflow.send_text("\n".join(self._events.copy()) + "\n", self._event_log.path.name)
            except Exception:
                self._events_pending = True
                raise

    def _begin_anew(self) -> None:
        """Another MLflow run in place of one that is gone, with every number of the log."""
        say(
            f"warning: MLflow at {self.mlflow.shown_uri} no longer has the run {self.mlflow.id}: a new one takes its "
            f"place, with every number of {self._log.path}",
            sys.stderr,
        )
        self.mlflow.forget()
        self._reached = False
        self._take_new()
        lines = [*self._log.lines(), *self._system_log.lines()]
        logged = [metric for line in lines for metric in _metrics(json.loads(line))]
        known = {(metric.key, metric.step) for metric in logged}
        self._pending = logged + [metric for metric in self._pending if (metric.key, metric.step) not in known]
        self._events_pending = bool(self._events)

    def _note_end(
        self,
        status: str,
        reason: str | None,
        files: list[str],
        results: Mapping[str, float] | None,
        checkpoint: Path | None,
        ended: int,
    ) -> None:
        """For MLflow, should it not be reached now."""
        self.mlflow.note()  # before: what begins has no end
        end = {"status": status, "reason": reason, "files": files, "results": dict(results or {}), "time": ended}
        write_journal(self._log.path.parent, {"end": {**end, "checkpoint": checkpoint and str(checkpoint)}})

    def _take_new(self) -> None:
        while self._new:
            self._pending.append(self._new.popleft())

    def _complain(self, error: Exception, last: bool = False) -> None:
        self._last_error = error
        if last or not self._complained:
            reason = without_credentials(" ".join(str(error).split()), self.mlflow.uri)[:300] or type(error).__name__
            then = "training goes on, they are sent again later, and " if self._training else ""
            if is_permanent(error) and self._training:
                then = "training goes on; once that is mended they are sent, by this run or one that goes on with it; "
            say(
                f"warning: MLflow at {self.mlflow.shown_uri} did not take the run ({reason}); {'' if last else then}"
                f"{self._log.path} has every number{_LATER if last and self._training else ''}",
                sys.stderr,
            )
        self._complained = True


def _event_step(line: str) -> int:
    return int(line.split("  step ")[1].split()[0])


def _metrics(record: Mapping[str, float]) -> list[Metric]:
    """MLflow's form of a line of log.jsonl."""
    stamp, step = round(record["time"] * 1000), int(record["step"])
    return [Metric(key, float(value), stamp, step) for key, value in record.items() if key not in ("time", "step")]


def _round(value: float) -> float:
    return float(f"{value:.7g}")
