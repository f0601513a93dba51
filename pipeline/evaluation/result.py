"""The folder of an evaluation: written beside its final name, and put there whole."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from data_prep.storage import atomic_folder
from pipeline.checkpoints.files import CheckpointError
from pipeline.data.decode import DecodeError, decode_rgb
from pipeline.data.shards import DataError
from pipeline.evaluation.sets import EvaluationSet
from pipeline.evaluation.summary import Images, finite, name_of

EVALUATIONS, RESULT_FILE, CLASSES_FILE, PICTURES = "evaluations", "evaluation.json", "per_class.csv", "pictures"
FORMAT_VERSION = 1
SAMPLES = 24
OF_A_PAIR = 3
_SIDE = 160  # pixels, the longer side of a picture
_NAME = re.compile(r"[\w.+@-]+", re.ASCII)
_NAME_BYTES = 200  # of the 255 that file systems give a name: it is written under a longer one


def folder_name(text: str) -> str:
    """What a result is called by itself: of a set in other letters what a name may have of it."""
    return re.sub(r"[^\w.+@-]+", "-", text, flags=re.ASCII)


def check_name(name: str) -> None:
    """Raises CheckpointError for a name that no result folder can have."""
    if not _NAME.fullmatch(name) or name.startswith(".") or len(name) > _NAME_BYTES:
        raise CheckpointError(
            f"{name[:40]!r} cannot be a folder's name: give --name of at most {_NAME_BYTES} letters, digits, and . - _"
        )


class ResultFolder:
    """`evaluations/NAME` of a run, being written; made at once: a full or foreign disk is met before the work."""

    def __init__(self, run: Path, name: str) -> None:
        self.final = run / EVALUATIONS / name
        self._whole = atomic_folder(self.final)

    def __enter__(self) -> Self:
        try:
            self.path = self._whole.__enter__()
            (self.path / PICTURES).mkdir()
        except OSError as error:
            raise self.refused(error) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._whole.__exit__(kind, error, at)
        except OSError as failure:
            raise self.refused(failure) from None

    def refused(self, error: OSError) -> CheckpointError:
        """What is to be raised where the disk takes no more."""
        return CheckpointError(
            f"{self.final} cannot be written: {error.strerror or error}: give another folder with --out"
        )

    def write(self, content: dict[str, Any], classes: Sequence[dict[str, Any]]) -> None:
        """evaluation.json and per_class.csv."""
        text = json.dumps({"format_version": FORMAT_VERSION, **content}, indent=1, allow_nan=False, ensure_ascii=False)
        (self.path / RESULT_FILE).write_text(text + "\n", encoding="utf-8")
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(classes[0]))
        writer.writeheader()
        writer.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in classes)
        (self.path / CLASSES_FILE).write_text(table.getvalue(), encoding="utf-8")

    def pictures(self, scored: EvaluationSet, images: Images, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Write the images of these rows of `images` as JPEG; returns their entries in evaluation.json. None where the
        set cannot show them again.
        """
        if scored.encoded is None or not rows:
            return []
        found = scored.encoded([int(images.sample[row]) for row in rows])
        return [
            self._picture(scored, images, row, data)
            for row, data in zip(rows, found, strict=True)
            if isinstance(data, bytes)
        ]

    def _picture(self, scored: EvaluationSet, images: Images, row: int, data: bytes) -> dict[str, Any]:
        sample = int(images.sample[row])
        file = f"{PICTURES}/{sample:08d}.jpg"
        if not (self.path / file).exists():
            try:
                picture = Image.fromarray(decode_rgb(data))
            except DecodeError as error:  # it was decoded a moment ago
                raise DataError(f"image {sample} of {scored.path} has changed meanwhile: {error}") from None
            picture.thumbnail((_SIDE, _SIDE))
            picture.save(self.path / file, "JPEG", quality=80)
        if scored.labels is None:
            wnid: str | None = scored.synsets[images.label[row]]
            name = name_of(scored.synsets[images.label[row]])
        else:
            wnid = None
            name = ", ".join(name_of(scored.synsets[number]) for number in scored.labels[sample] if number >= 0)
        predictions = [
            {"wnid": scored.synsets[number], "name": name_of(scored.synsets[number]), "probability": finite(share)}
            for number, share in zip(images.top[row], images.probability[row], strict=True)
        ]
        source = None if scored.sources is None else scored.sources[sample]
        return {
            "file": file,
            "sample": sample,
            "source": source,
            "wnid": wnid,
            "name": name,
            "correct": bool(images.correct[row]),
            "predictions": predictions,
        }


def spread(images: Images) -> list[int]:
    """Rows of images to show, at even distances."""
    return sorted(set(np.linspace(0, len(images.sample) - 1, SAMPLES).astype(int).tolist()))


def of_pair(images: Images, label: int, other: int) -> list[int]:
    """Rows of the images of a class that were taken for another with most confidence."""
    rows = np.flatnonzero((images.label == label) & (images.predicted == other) & ~images.correct)
    order = np.argsort(-images.confidence[rows], kind="stable")
    return [int(row) for row in rows[order[:OF_A_PAIR]]]
