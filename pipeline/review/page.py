"""The page: one HTML file with everything in it, which loads nothing.

What it holds stands in script elements as base64 of gzip: no text of a run can end such an element, and a browser
opens it with DecompressionStream. Its budget of bytes is dealt to Plotly, to curves, to pictures; what has no room is
thinned out or left out, and the page says so.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib import resources, util
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.storage import atomic_write
from pipeline.review import timeline
from pipeline.review.differences import differences
from pipeline.review.evaluations import Evaluation, picture_uri
from pipeline.review.lineage import Lineage
from pipeline.review.log import Curve, Log, curves
from pipeline.review.run import ReviewError, Run, score_of
from pipeline.review.terminal import data_share

PAGE_BYTES = 5_000_000
# Of what is left beside Plotly (2.1 MB), as gzip, which base64 makes a third larger.
_CURVES_BYTES, _PICTURES_BYTES, _TABLES_BYTES = 1_300_000, 450_000, 300_000
_BUCKETS = 1500  # at most: as many as a screen has pixels across
_MOST_BUCKETS = 12_000  # of all runs together, tried first
_SCRIPTS = ("dom", "charts", "runs", "curves", "time", "evaluations", "dense", "configuration", "lineage", "start")


class Page:
    """Made run by run, so that one log is in memory at a time."""

    def __init__(self, count: int) -> None:
        """For `count` runs."""
        self._share = _CURVES_BYTES // max(count, 1)
        self._buckets = min(_BUCKETS, max(40, _MOST_BUCKETS // max(count, 1)))
        self._runs: list[bytes] = []

    def add(self, run: Run, log: Log) -> None:
        """Take a run's curves and time line; its log is not needed any more."""
        buckets = self._buckets
        while True:
            packed = _pack(_run(run, log, buckets))
            if len(packed) <= self._share or buckets <= 8:
                break
            buckets = max(8, min(int(buckets * 0.95 * self._share / len(packed)), buckets - 1))
        self._runs.append(packed)

    def write(self, path: Path, runs: list[Run], evaluations: list[Evaluation], mlflow: str | None) -> int:
        """Write the page of `runs`, which were all added, in that order; returns its bytes. Raises OSError."""
        lineage = Lineage(runs, evaluations)
        evaluated = [evaluation.content for evaluation in evaluations]
        shared = {
            "created": round(time.time() * 1000),
            "mlflow": mlflow,
            "differences": differences([run.config for run in runs]),
            "configured": [bool(run.config) for run in runs],
            "lineage": {"nodes": [node._asdict() for node in lineage.nodes], "edges": list(lineage.edges)},
            "evaluations": evaluated,
        }
        while len(packed := _pack(shared)) > _TABLES_BYTES and any(_shorten(content) for content in evaluated):
            pass
        blocks = [("shared", packed), *((f"run-{i}", run) for i, run in enumerate(self._runs))]
        blocks.append(("pictures", _pack(dict(_pictures(evaluations)))))
        content = _html(blocks, f"{len(runs)} run{'s' if len(runs) != 1 else ''}: {', '.join(r.name for r in runs)}")
        with atomic_write(path) as file:
            file.write(content)
        return len(content)


def _run(run: Run, log: Log, buckets: int) -> dict[str, Any]:
    """A run as the page takes it: curves index `steps` and `ms` (of running), and all whole numbers are differences."""
    found = curves(log, buckets)
    parts = [part for curve in found.values() for part in (curve.rows, curve.mean_rows) if part is not None]
    rows = np.unique(np.concatenate([*parts, np.empty(0, np.int64)])).astype(np.int64)
    milliseconds = np.round(run.timeline.hours[rows] * 3_600_000).astype(np.int64)
    return {
        "name": run.name,
        "path": str(run.path),
        "stage": run.stage,
        "state": run.state,
        "model": run.config.get("model.name", ""),
        "step": run.step,
        "steps_of_all": run.steps,
        "lines": run.lines,
        "damaged": run.damaged,
        "batch": run.global_batch,
        "mlflow": run.mlflow,
        "last": {key: _json_number(run.last[key]) for key in found},
        "score": _json_number(run.score),
        "score_name": score_of(run.stage)[1],
        "best_score": _json_number(run.best_score),
        "images_per_second": _json_number(run.images_per_second),
        "data_share": _json_number(data_share(run)),
        "steps": _deltas(log.steps[rows]),
        "ms": _deltas(milliseconds),
        "curves": {key: _curve(curve, rows) for key, curve in found.items()},
        "timeline": timeline.as_json(run.timeline),
    }


def _curve(curve: Curve, rows: np.ndarray) -> dict[str, Any]:
    packed = {"at": _deltas(np.searchsorted(rows, curve.rows)), "values": [*map(_json_number, curve.values.tolist())]}
    if curve.mean_rows is not None and curve.means is not None:
        packed["mean_at"] = _deltas(np.searchsorted(rows, curve.mean_rows))
        packed["means"] = [float(f"{mean:.5g}") for mean in curve.means.tolist()]
    return packed


def _deltas(values: np.ndarray) -> list[int]:
    return [int(each) for each in np.diff(values, prepend=0).tolist()]


def _json_number(value: float | None) -> float | int | str | None:
    """JSON has no NaN and no infinity: they are texts. A whole number has no point."""
    if value is None or (math.isfinite(value) and value != round(value)):
        return value
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return int(value) if abs(value) < 2**53 else value


def _shorten(content: dict[str, Any]) -> bool:
    """Half of an evaluation's classes, where it has many: the worst of them, which come first. Whether it had."""
    if len(content["classes"]) <= 50:
        return False
    content["classes"] = content["classes"][: len(content["classes"]) // 2]
    return True


def _pictures(evaluations: list[Evaluation]) -> Iterator[tuple[str, str]]:
    """Pictures as data: URIs under "evaluation's number/file", of each evaluation as many as have room."""
    share = _PICTURES_BYTES / max(len(evaluations), 1)
    for i, evaluation in enumerate(evaluations):
        left = share
        for name, path in evaluation.pictures.items():
            uri = picture_uri(path)
            if uri is not None and (left := left - len(uri) * 0.76) >= 0:
                yield f"{i}/{name}", uri


def _pack(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return gzip.compress(text.encode(), 9, mtime=0)


def _html(blocks: list[tuple[str, bytes]], title: str) -> bytes:
    script = "\n".join(_own(f"{name}.js") for name in _SCRIPTS)
    slots: dict[str, Callable[[], str]] = {
        "title": lambda: html.escape(title[:200]),
        "style": lambda: _own("style.css"),
        "script": lambda: script,
        "nonce": lambda: hashlib.sha256(script.encode() + b"".join(block for _, block in blocks)).hexdigest()[:32],
        "blocks": lambda: "\n".join(_block(name, packed) for name, packed in [("plotly", _plotly()), *blocks]),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]](), _own("index.html")).encode()


def _block(name: str, packed: bytes) -> str:
    return f'<script type="text/plain" id="{name}">{base64.b64encode(packed).decode()}</script>'


@cache
def _own(name: str) -> str:
    return (resources.files("pipeline.review") / "page" / name).read_text(encoding="utf-8")


@cache
def _plotly() -> bytes:
    """Plotly's bundle as the Python package brings it: read from its folder, for importing it takes a second."""
    found = util.find_spec("plotly")
    path = (
        Path(found.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
        if (found is not None and found.submodule_search_locations)
        else None
    )
    if path is None or not path.is_file():
        raise ReviewError("the package plotly is not installed, or not whole: `make setup`")
    return gzip.compress(path.read_bytes(), 9, mtime=0)
