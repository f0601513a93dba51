"""What `evaluate` left in a run's folder, cut to what a page can hold: scores, classes, worst pairs, pictures."""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.review.run import read_mapping

_NAMES = 20  # evaluations of a run, the newest
_CLASSES = 1000  # in the table: the worst and the best; all are counted
_CSV_ROWS = 100_000
_GROUPS = 40  # of a confusion matrix, as many as can be read
_PAIRS, _SAMPLES, _PER_PAIR = 20, 24, 6
_TEXT_CHARS = 160
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
    """Those of a run, the oldest first. A folder without a readable evaluation.json is none."""
    try:
        folders = [path for path in (run_path / "evaluations").iterdir() if path.is_dir()]
    except OSError:
        return []
    found = []
    for folder in folders:
        said = read_mapping(folder / "evaluation.json")
        if isinstance(said.get("results"), dict):
            found.append((_text(said.get("created")), folder.name, folder, said))
    return [
        _evaluation(run_path, run_name, folder, said) for _, _, folder, said in sorted(found, key=lambda each: each[:2])
    ][-_NAMES:]


def _evaluation(run_path: Path, run_name: str, folder: Path, said: dict[str, Any]) -> Evaluation:
    pairs = [_pair(pair) for pair in _mappings(said.get("worst_pairs"), _PAIRS)]
    samples = [_picture(sample) for sample in _mappings(said.get("samples"), _SAMPLES)]
    rows, count = _classes(folder / "per_class.csv")
    content = {
        "run": run_name,
        "name": folder.name,
        "created": _text(said.get("created")),
        "checkpoint": _scalars(said.get("checkpoint")),
        "data": _scalars(said.get("data")),
        "protocol": _scalars(said.get("protocol")),
        "results": _scalars(said.get("results")),
        "reliability": [_scalars(each) for each in _mappings(said.get("reliability"), 100)],
        "confusion": _confusion(said.get("confusion")),
        "pairs": pairs,
        "samples": samples,
        "classes": _worst_and_best(rows),
        "class_count": count,
        "histogram": _histogram(rows),
    }
    pictures = {}
    # In turn: where there is no room for all, each pair has one, and some samples are seen.
    by_pair = [pair["pictures"] for pair in pairs]
    in_turn = [pictures_of[i] for i in range(_PER_PAIR) for pictures_of in by_pair if i < len(pictures_of)]
    for picture in _alternating(in_turn, samples):
        if (path := _inside(folder, picture["file"])) is not None:
            pictures[picture["file"]] = path
    return Evaluation(run_path, folder.name, content, pictures)


def _alternating(*lists: list[Any]) -> Iterator[Any]:
    for i in range(max(map(len, lists), default=0)):
        yield from (each[i] for each in lists if i < len(each))


def _inside(folder: Path, name: str) -> Path | None:
    """A file of the folder itself: a link or a name that leads out of it is none."""
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        return path if name and inside and path.is_file() else None
    except (OSError, ValueError):
        return None


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
    return {**_scalars(pair), "pictures": [_picture(each) for each in _mappings(pair.get("pictures"), _PER_PAIR)]}


def _picture(picture: dict[str, Any]) -> dict[str, Any]:
    predictions = [_scalars(each) for each in _mappings(picture.get("predictions"), 5)]
    return {**_scalars(picture), "file": _text(picture.get("file")), "predictions": predictions}


def _confusion(said: Any) -> dict[str, Any] | None:
    if not isinstance(said, dict):
        return None
    groups, matrix = _mappings(said.get("groups"), _GROUPS + 1), said.get("matrix")
    count = len(groups)
    if not 0 < count <= _GROUPS or not isinstance(matrix, list) or len(matrix) != count:
        return None
    if not all(isinstance(row, list) and len(row) == count and all(map(_is_number, row)) for row in matrix):
        return None
    return {"by": _text(said.get("by")), "groups": [_scalars(group) for group in groups], "matrix": matrix}


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


def _cell(key: str, text: str | None) -> Any:
    if key not in _NUMBERS:
        return _text(text)
    try:
        value = float(text or "")
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


def _mappings(value: Any, most: int) -> list[dict[str, Any]]:
    return [each for each in value[:most] if isinstance(each, dict)] if isinstance(value, list) else []


def _scalars(value: Any) -> dict[str, Any]:
    """The numbers and texts of a mapping; a list as how many it has."""
    if not isinstance(value, dict):
        return {}
    shown: dict[str, Any] = {}
    for key, each in list(value.items())[:60]:
        if each is None or isinstance(each, bool) or _is_number(each):
            shown[str(key)] = each
        elif isinstance(each, str):
            shown[str(key)] = _text(each)
        elif isinstance(each, list) and key == "unmatched":
            shown[str(key)] = len(each)
    return shown


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _text(value: Any) -> str:
    return value[:_TEXT_CHARS] if isinstance(value, str) else ""
