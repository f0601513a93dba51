"""What `evaluate` and its sisters left in a run's folder, cut to what a page can hold: scores, classes, pictures."""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.review.dense_evaluations import RESULT_FILES, dense_content
from pipeline.review.run import read_mapping
from pipeline.review.said import file_inside, is_number, mappings, scalars, text

_NAMES = 20  # evaluations of a run, the newest
_CLASSES = 1000  # in the table: the worst and the best; all are counted
_CSV_ROWS = 100_000
_GROUPS = 40  # of a confusion matrix, as many as can be read
_PAIRS, _SAMPLES, _PER_PAIR = 20, 24, 6
_PICTURE_BYTES = 60_000
_COLUMNS = ("wnid", "name", "images", "top1_percent", "top5_percent", "precision_percent", "confused_with_name")
_NUMBERS = ("images", "top1_percent", "top5_percent", "precision_percent")
_BINS = 20


class Evaluation(NamedTuple):
    """One folder of the run at `run_path`: `content` is for the page, without pictures; `pictures`: what stands there
    as a file, by its name.
    """

    run_path: Path
    name: str
    content: dict[str, Any]
    pictures: dict[str, Path]


def read_evaluations(run_path: Path, run_name: str) -> list[Evaluation]:
    """Those of a run, the oldest first. A folder without a readable result file is none."""
    try:
        folders = [path for path in (run_path / "evaluations").iterdir() if path.is_dir()]
    except OSError:
        return []
    found = []
    for folder in folders:
        for file in ("evaluation.json", *RESULT_FILES):
            said = read_mapping(folder / file)
            if isinstance(said.get("results"), dict):
                found.append((text(said.get("created")), folder.name, file, folder, said))
    found.sort(key=lambda each: each[:3])
    return [_evaluation(run_path, run_name, *each[2:]) for each in found[-_NAMES:]]


def _evaluation(run_path: Path, run_name: str, file: str, folder: Path, said: dict[str, Any]) -> Evaluation:
    content = {
        "run": run_name,
        "name": folder.name,
        "created": text(said.get("created")),
        "checkpoint": scalars(said.get("checkpoint")),
        "data": scalars(said.get("data")),
        "protocol": scalars(said.get("protocol")),
        "results": scalars(said.get("results")),
    }
    more, names = _classification(folder, said) if file not in RESULT_FILES else dense_content(file, said)
    found = {name: file_inside(folder, name) for name in names}
    pictures = {name: path for name, path in found.items() if path is not None}
    return Evaluation(run_path, folder.name, {**content, **more}, pictures)


def _classification(folder: Path, said: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What the page shows beside scores, and the files of its pictures, the most wanted first."""
    pairs = [_pair(pair) for pair in mappings(said.get("worst_pairs"), _PAIRS)]
    samples = [_picture(sample) for sample in mappings(said.get("samples"), _SAMPLES)]
    rows, count = _classes(folder / "per_class.csv")
    content = {
        "kind": "classify",
        "score": ["top-1", scalars(said["results"]).get("top1_percent")],
        "reliability": [scalars(each) for each in mappings(said.get("reliability"), 100)],
        "confusion": _confusion(said.get("confusion")),
        "pairs": pairs,
        "samples": samples,
        "classes": _worst_and_best(rows),
        "class_count": count,
        "histogram": _histogram(rows),
    }
    # In turn: where there is no room for all, each pair has one, and some samples are seen.
    by_pair = [pair["pictures"] for pair in pairs]
    in_turn = [pictures_of[i] for i in range(_PER_PAIR) for pictures_of in by_pair if i < len(pictures_of)]
    return content, [picture["file"] for picture in _alternating(in_turn, samples)]


def _alternating(*lists: list[Any]) -> Iterator[Any]:
    for i in range(max(map(len, lists), default=0)):
        yield from (each[i] for each in lists if i < len(each))


def picture_uri(path: Path) -> str | None:
    """A JPEG or PNG file as a data: URI; None for anything else, or one that is too large."""
    try:
        with open(path, "rb") as file:
            content = file.read(_PICTURE_BYTES + 1)
    except OSError:
        return None
    kind = "jpeg" if content.startswith(b"\xff\xd8\xff") else "png" if content.startswith(b"\x89PNG\r\n") else None
    if kind is None or len(content) > _PICTURE_BYTES:
        return None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _pair(pair: dict[str, Any]) -> dict[str, Any]:
    return {**scalars(pair), "pictures": [_picture(each) for each in mappings(pair.get("pictures"), _PER_PAIR)]}


def _picture(picture: dict[str, Any]) -> dict[str, Any]:
    predictions = [scalars(each) for each in mappings(picture.get("predictions"), 5)]
    return {**scalars(picture), "file": text(picture.get("file")), "predictions": predictions}


def _confusion(said: Any) -> dict[str, Any] | None:
    if not isinstance(said, dict):
        return None
    groups, matrix = mappings(said.get("groups"), _GROUPS + 1), said.get("matrix")
    count = len(groups)
    if not 0 < count <= _GROUPS or not isinstance(matrix, list) or len(matrix) != count:
        return None
    if not all(isinstance(row, list) and len(row) == count and all(map(is_number, row)) for row in matrix):
        return None
    return {"by": text(said.get("by")), "groups": [scalars(group) for group in groups], "matrix": matrix}


def _classes(path: Path) -> tuple[list[list[Any]], int]:
    """Rows of per_class.csv as _COLUMNS, and how many there are; a class without images has None for its numbers."""
    rows: list[list[Any]] = []
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            for row in csv.DictReader(file):
                if len(rows) >= _CSV_ROWS:
                    break
                rows.append([_cell(key, row.get(key)) for key in _COLUMNS])
    except (OSError, csv.Error):
        pass
    return rows, len(rows)


def _cell(key: str, said: str | None) -> Any:
    if key not in _NUMBERS:
        return text(said)
    try:
        value = float(said or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _worst_and_best(rows: list[list[Any]]) -> list[list[Any]]:
    """By top-1, the worst first; classes without images last."""
    place = _COLUMNS.index("top1_percent")
    ordered = sorted(rows, key=lambda row: (row[place] is None, row[place] or 0.0))
    if len(ordered) <= _CLASSES:
        return ordered
    return ordered[: _CLASSES * 3 // 4] + [row for row in ordered if row[place] is not None][-_CLASSES // 4 :]


def _histogram(rows: list[list[Any]]) -> list[int]:
    """How many classes have a top-1 in each twentieth of 0 to 100 %."""
    counts = [0] * _BINS
    for row in rows:
        if (top1 := row[_COLUMNS.index("top1_percent")]) is not None:
            counts[min(max(int(top1 / 100 * _BINS), 0), _BINS - 1)] += 1
    return counts
