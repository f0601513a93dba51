"""What `evaluate-segment` and `evaluate-detect` left in a run's folder, as the page of runs shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.review.said import is_number, mappings, number, scalars, text

_PICTURES, _CLASSES, _POINTS = 8, 1000, 101
_COLOUR = re.compile(r"#[0-9a-f]{6}")


class _Kind(NamedTuple):
    """A result file. score: what stands for all, and its name; figures: of the results, with their names and decimals,
    percent but for the last argument; columns: of a class's row, with None for texts.
    """

    kind: str
    score: tuple[str, str]
    figures: tuple[tuple[str, str, int, bool], ...]
    columns: tuple[tuple[str, str, int | None], ...]


_AREAS = (("", ""), ("50", " at IoU 0.5"), ("75", " at IoU 0.75"), ("_small", ", small"), ("_medium", ", medium"))
_AVERAGE_PRECISIONS = tuple(
    (f"{kind}_ap{key}", f"{kind} AP{name}", 2, True)
    for kind in ("box", "mask")
    for key, name in (*_AREAS, ("_large", ", large"))
)
RESULT_FILES = {
    "segmentation.json": _Kind(
        "segment",
        ("miou", "mIoU"),
        (
            ("miou", "mIoU", 2, True),
            ("macc", "class accuracy", 2, True),
            ("pixel_accuracy", "pixels", 2, True),
            ("val_loss", "loss", 4, False),
            ("classes_absent", "classes absent", 0, False),
            ("val_samples", "images", 0, False),
        ),
        (
            ("class", "class", None),
            ("iou_percent", "IoU %", 1),
            ("recall_percent", "recall %", 1),
            ("precision_percent", "precision %", 1),
            ("pixels", "pixels", 0),
            ("mistaken_for", "mostly taken for", None),
        ),
    ),
    "detection.json": _Kind(
        "detect",
        ("box_ap", "box AP"),
        (*_AVERAGE_PRECISIONS, ("val_samples", "images", 0, False)),
        (
            ("class", "class", None),
            ("box_ap_percent", "box AP %", 1),
            ("mask_ap_percent", "mask AP %", 1),
            ("annotations", "objects", 0),
        ),
    ),
}
_CURVES = {"ap50": "IoU 0.5", "ap75": "IoU 0.75", "ap": "mean of 0.5 to 0.95"}


def dense_content(file: str, said: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What the page shows of a result file beside its scores, and the names of its pictures."""
    kind, results = RESULT_FILES[file], scalars(said["results"])
    rows = mappings(said.get("classes"), 10**6)
    pictures = [_picture(each) for each in mappings(said.get("pictures"), _PICTURES)]
    content = {
        "kind": kind.kind,
        "score": [kind.score[1], number(results.get(kind.score[0]))],
        "figures": [
            [name, results[key], decimals, percent]
            for key, name, decimals, percent in kind.figures
            if is_number(results.get(key))
        ],
        "columns": [[name, decimals] for _, name, decimals in kind.columns],
        "classes": _worst_first([[_cell(row.get(key), decimals) for key, _, decimals in kind.columns] for row in rows]),
        "class_count": len(rows),
        "curves": _curves(said.get("curves")),
        "pictures": pictures,
    }
    return content, [each["file"] for each in pictures]


def _worst_first(rows: list[list[Any]]) -> list[list[Any]]:
    """By the first number of a row; classes that are in no image last."""
    return sorted(rows, key=lambda row: (row[1] is None, row[1] or 0.0))[:_CLASSES]


def _cell(value: Any, decimals: int | None) -> Any:
    return text(value) if decimals is None else number(value)


def _picture(said: dict[str, Any]) -> dict[str, Any]:
    found = said.get("classes")
    classes = found.items() if isinstance(found, dict) else ()
    seen = [[text(name), colour] for name, colour in classes if isinstance(colour, str) and _COLOUR.fullmatch(colour)]
    return {
        "file": text(said.get("file")),
        "name": text(said.get("name")),
        "score": number(said.get("score_percent")),
        "classes": seen,
    }


def _curves(said: Any) -> list[dict[str, Any]]:
    """Precision over recall: a title, the recalls, and named lines for each of boxes and masks that is there whole."""
    if not isinstance(said, dict) or not _is_curve(said.get("recall")):
        return []
    found = []
    for kind, title in (("box", "boxes"), ("mask", "masks")):
        lines = {name: said.get(f"{kind}_{key}", []) for key, name in _CURVES.items()}
        whole = {name: line for name, line in lines.items() if _is_curve(line) and len(line) == len(said["recall"])}
        if whole:
            found.append({"title": title, "recall": said["recall"], "lines": whole})
    return found


def _is_curve(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _POINTS and all(map(is_number, value))
