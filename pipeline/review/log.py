"""`log.jsonl` of a run as columns, and each column as a curve of few points that shows what the whole one does."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_LINE_BYTES = 100_000  # one of ours has 400
_LINES = 5_000_000
_KEYS = 60
_ROWS = 10_000
_NUMBERS = (float, int)  # a bool is none
_NO_CURVE = ("time", "step", "samples_seen", "epoch")  # what a curve is drawn over


class Column(NamedTuple):
    """One metric: `values[i]`, as logged, stands in line `rows[i]` of the log."""

    rows: np.ndarray
    values: np.ndarray


class Log(NamedTuple):
    """A log's whole lines. `steps` (int64) and `times` (s since 1970) have one entry a line; `damaged`: lines that
    could not be read, or say nothing of a step.
    """

    steps: np.ndarray
    times: np.ndarray
    columns: dict[str, Column]
    damaged: int

    def largest(self, key: str) -> float | None:
        """The largest finite value of a metric."""
        finite = self._finite(key)
        return float(finite.max()) if len(finite) else None

    def median(self, key: str) -> float | None:
        """The median of its finite values."""
        finite = self._finite(key)
        return float(np.median(finite)) if len(finite) else None

    def _finite(self, key: str) -> np.ndarray:
        column = self.columns.get(key)
        return column.values[np.isfinite(column.values)] if column is not None else np.empty(0)


def read_log(path: Path, advance: Callable[[int], object] = lambda read: None) -> Log:
    """Read a log that may be of any length, damaged, half written or missing; `advance` is told of bytes read."""
    parts = _Parts()
    try:
        with open(path, "rb") as file:
            while (line := file.readline(_LINE_BYTES)) and len(parts.steps) < _LINES:
                advance(len(line))
                if not parts.take(line):
                    while line and not line.endswith(b"\n"):  # the rest of one that is too long
                        line = file.readline(_LINE_BYTES)
    except OSError:
        pass
    return parts.log()


class _Parts:
    """A log while it is read. Lines of the same keys are put away as rows, and become numbers many at a time: there may
    be millions of them.
    """

    def __init__(self) -> None:
        self.steps, self.times, self.damaged = array("q"), array("d"), 0
        self._lines: dict[tuple[str, ...], tuple[list[int], list[tuple[Any, ...]]]] = {}
        self._columns: dict[str, list[Column]] = {}

    def take(self, line: bytes) -> bool:
        """Whether it is a line of a log."""
        record = _record(line)
        if record is None:
            self.damaged += 1
            return False
        rows, values = self._lines.setdefault(tuple(record), ([], []))
        rows.append(len(self.steps))
        values.append(tuple(record.values()))
        self.steps.append(int(record["step"]))
        self.times.append(float(record["time"]))
        if len(rows) >= _ROWS or len(self._lines) > _KEYS:
            self._put_away()
        return True

    def _put_away(self) -> None:
        for keys, (rows, values) in self._lines.items():
            lines = np.array(rows, dtype=np.int32)
            for key, column in zip(keys, zip(*values, strict=True), strict=True):
                if key in self._columns or len(self._columns) < _KEYS:
                    is_number, numbers = _numbers(column)
                    if len(numbers):
                        self._columns.setdefault(key, []).append(Column(lines[is_number], numbers))
        self._lines.clear()

    def log(self) -> Log:
        """All that was taken."""
        self._put_away()
        columns = {key: _joined(parts) for key, parts in self._columns.items()}
        return Log(np.array(self.steps, dtype=np.int64), np.array(self.times, dtype=np.float64), columns, self.damaged)


def _numbers(column: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which of the values are numbers, and these as float64."""
    if set(map(type, column)) == {float}:
        return np.ones(len(column), dtype=bool), np.array(column)
    is_number = np.array([type(value) in _NUMBERS for value in column])
    return is_number, np.array([_float(value) for value, good in zip(column, is_number, strict=True) if good])


def _joined(parts: list[Column]) -> Column:
    rows = np.concatenate([part.rows for part in parts])
    order = np.argsort(rows, kind="stable")
    return Column(rows[order], np.concatenate([part.values for part in parts])[order])


def _float(value: float | int) -> float:
    try:
        return float(value)
    except OverflowError:  # JSON has integers of any length
        return math.inf


def _record(line: bytes) -> dict[str, Any] | None:
    """None for a line that is cut off, is no object, or lacks its step or its time."""
    try:
        record = json.loads(line)
        step, time = record["step"], record["time"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if type(step) not in (int, float) or type(time) not in (int, float) or not (math.isfinite(step + time)):
        return None
    return record if 0 <= step < 2**53 and 0 <= time < 1e11 else None


class Curve(NamedTuple):
    """A metric in few points: those of `rows` are the log's own. `means` of the buckets that were thinned out, at
    `mean_rows`: None where every point is there.
    """

    rows: np.ndarray
    values: np.ndarray
    mean_rows: np.ndarray | None
    means: np.ndarray | None


def curves(log: Log, buckets: int) -> dict[str, Curve]:
    """Every metric of a log, thinned out to about two points a bucket."""
    return {key: thinned(log, column, buckets) for key, column in log.columns.items() if key not in _NO_CURVE}


def thinned(log: Log, column: Column, buckets: int) -> Curve:
    """The first and the last point, and of each of `buckets` equal stretches of steps the smallest, the largest and the
    first that is not finite: a peak of one step stays where it was, as high as it was.
    """
    rows, values = column
    if len(values) <= 2 * buckets:
        return Curve(rows, values, None, None)
    finite = np.isfinite(values)
    low, high = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
    steps = log.steps[rows]
    edges = np.searchsorted(steps, np.linspace(steps[0], steps[-1] + 1, buckets + 1))
    kept, mean_rows, means = {0, len(values) - 1}, [], []
    if low.min() == high.max():  # always the same
        edges = edges[[0, -1]]
    for begin, end in pairwise(edges.tolist()):
        if begin >= end:
            continue
        kept |= {begin + int(low[begin:end].argmin()), begin + int(high[begin:end].argmax())}
        inside = finite[begin:end]
        if not inside.all():
            kept.add(begin + int(inside.argmin()))
        if inside.any():
            mean_rows.append(rows[(begin + end - 1) // 2])
            means.append(values[begin:end][inside].mean())
    index = np.array(sorted(kept))
    return Curve(rows[index], values[index], np.array(mean_rows), np.array(means))
