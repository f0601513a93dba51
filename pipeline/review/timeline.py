"""What happened in a run beside its numbers, when, and what its hours were spent on."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.credentials import without_credentials
from pipeline.review.log import Log

_EVENTS_BYTES = 2_000_000  # of the end of the file, and no more lines than are shown
_EVENTS = 400
_TEXT_CHARS = 300
_EVENT = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4})  step (\d{1,15})  (.*)")
# What the run says of it, by how the line begins (training/run.py, training/diagnose.py).
_KINDS = (("LEFT OUT", "skipped"), ("REWOUND", "rewind"), ("RESUMED", "resumed"), ("stopped", "stopped"))
_UNTOLD_STOP_SECONDS = 600.0  # between two lines, when nothing says why, and it is far beyond what is usual
_UNTOLD_STOP_FACTOR = 20.0


class Event(NamedTuple):
    """kind: skipped, rewind, resumed, stopped, not-finite or other; time in s since 1970."""

    time: float
    step: int
    kind: str
    text: str


class Spent(NamedTuple):
    """Seconds of a run, from its first step to its last line."""

    training: float
    data: float
    evaluation: float
    other: float
    stopped: float


class Timeline(NamedTuple):
    """`events` in order; `running`: (begin, end) in s since 1970, between stops; `hours`: of running, of each line of
    the log; `left_out`: events that are not among them.
    """

    events: list[Event]
    running: list[tuple[float, float]]
    hours: np.ndarray
    spent: Spent
    left_out: int


def read_timeline(folder: Path, log: Log, global_batch: float | None) -> Timeline:
    """The time line of a run's folder; whatever is missing is not on it."""
    told = [event for line in _last_lines(folder / "events.txt") if (event := _event(line))]
    events = sorted([*told, *_not_finite(log)], key=lambda event: (event.time, event.step))
    if not len(log.steps):
        return Timeline(events[-_EVENTS:], [], np.empty(0), Spent(0, 0, 0, 0, 0), max(0, len(events) - _EVENTS))
    expected, waited = _windows(log, global_batch)
    wall = np.maximum(np.diff(log.times, prepend=log.times[0] - expected[0]), 0.0)
    same_step = np.diff(log.steps, prepend=-1) == 0  # an evaluation's line follows that of its step
    stopped = _stopped(log, wall, expected, same_step, told)
    begin = log.times - wall + stopped
    running, first = [], 0
    for row in np.flatnonzero(stopped > 0).tolist():
        running.append((float(begin[first]), float(log.times[row - 1] if row else begin[0])))
        first = row
    running.append((float(begin[first]), float(log.times[-1])))
    trained = np.minimum(expected, wall)
    evaluation = float(wall[same_step].sum())
    data = float((trained * waited).sum())
    other = float((wall - trained - stopped)[~same_step].sum())
    spent = Spent(float(trained.sum()) - data, data, evaluation, max(other, 0.0), float(stopped.sum()))
    hours = np.cumsum(wall - stopped) / 3600
    return Timeline(events[-_EVENTS:], running, hours, spent, max(0, len(events) - _EVENTS))


def _windows(log: Log, global_batch: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Of each line: seconds that its steps took by its own images/s, and the share of them that was waited for data."""
    expected, waited = np.zeros(len(log.steps)), np.zeros(len(log.steps))
    speed = log.columns.get("images_per_second")
    if speed is None or not global_batch:
        return expected, waited
    rows = speed.rows
    steps = np.diff(log.steps[rows], prepend=0)
    if len(steps) > 1:  # of a log that does not begin at the start
        steps[0] = min(steps[0], max(int(np.median(steps[1:])), 1))
    good = np.isfinite(speed.values) & (speed.values > 0)
    expected[rows[good]] = np.maximum(steps[good], 0) * global_batch / speed.values[good]
    if (share := log.columns.get("data_wait")) is not None:
        waited[share.rows] = np.clip(np.nan_to_num(share.values), 0.0, 1.0)
    return expected, waited


def _stopped(
    log: Log, wall: np.ndarray, expected: np.ndarray, same_step: np.ndarray, events: list[Event]
) -> np.ndarray:
    """Seconds before each line in which nothing ran, or steps did that were run again."""
    stopped = np.zeros(len(wall))
    beyond = np.maximum(wall - expected, 0.0)
    for event in events:
        if event.kind == "resumed":  # the first line past the step that it went on from
            row = int(np.searchsorted(log.steps, event.step, side="right"))
            if 0 < row < len(wall):
                gone = min(event.time, log.times[row]) - log.times[row - 1]
                stopped[row] = min(max(stopped[row], gone, 0.0), beyond[row])
    usual = float(np.median(wall)) if len(wall) else 0.0
    untold = (beyond > max(_UNTOLD_STOP_SECONDS, _UNTOLD_STOP_FACTOR * usual)) & (stopped == 0) & ~same_step
    untold[0] = False
    return np.where(untold, beyond, stopped)


def _not_finite(log: Log) -> list[Event]:
    """The first line of each stretch whose loss or gradient is not finite."""
    found = []
    for key in ("loss", "grad_norm", "val_loss"):
        column = log.columns.get(key)
        if column is None:
            continue
        bad = ~np.isfinite(column.values)
        for i in np.flatnonzero(bad & ~np.concatenate([[False], bad[:-1]]))[:_EVENTS]:
            row = column.rows[i]
            text = f"{key} is {column.values[i]}"
            found.append(Event(float(log.times[row]), int(log.steps[row]), "not-finite", text))
    return found


def _last_lines(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _EVENTS_BYTES))
            return file.read(_EVENTS_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return []


def _event(line: str) -> Event | None:
    match = _EVENT.fullmatch(line)
    if match is None:
        return None
    stamp, step, text = match.groups()
    try:
        time = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S %z").timestamp()
    except (ValueError, OverflowError, OSError):
        return None
    kind = next((kind for words, kind in _KINDS if text.startswith(words)), "other")
    return Event(time, int(step), kind, without_credentials(text)[:_TEXT_CHARS])


def as_json(timeline: Timeline) -> dict[str, Any]:
    """For the page; times in ms since 1970."""
    return {
        "events": [[round(event.time * 1000), event.step, event.kind, event.text] for event in timeline.events],
        "running": [[round(begin * 1000), round(end * 1000)] for begin, end in timeline.running],
        "spent": timeline.spent._asdict(),
        "left_out": timeline.left_out,
    }
