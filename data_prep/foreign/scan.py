"""What a tar of somebody else's holds, and what its samples say of their classes: an index file and more."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from data_prep.manifest import ShardIndex
from data_prep.storage import DataPrepError


class ForeignError(DataPrepError):
    """The tars cannot be made a data set as they are, or not without being told more."""


@dataclass(frozen=True)
class Scan:
    """What a tar holds. wnid (N,) int32: position in `wnids`, or -1; number (N,) int64: the class number, or -1."""

    index: ShardIndex
    wnids: list[str]
    wnid: np.ndarray
    number: np.ndarray
    # bytes, sha256, left_out (samples); tars: their folder, where the index is elsewhere; others (samples of other
    # classes that were skipped) and of_classes (a digest of those that were not), where some were taken only
    about: dict[str, Any]

    def only(self, tar: str, classes: Sequence[str]) -> Self:
        """Without the samples of other classes than `classes`. Raises ForeignError for one that has but a number."""
        if (self.wnid < 0).any():
            key = str(self.index.keys[int(np.flatnonzero(self.wnid < 0)[0])])
            raise ForeignError(
                f"{tar}: sample {key!r} gives its class only as a number: --others skip needs WordNet ids, index the "
                "tars with the whole list of --classes"
            )
        taken = np.isin(self.wnid, [at for at, wnid in enumerate(self.wnids) if wnid in set(classes)])
        index = ShardIndex(*(getattr(self.index, name)[taken] for name in ("keys", "offsets", "sizes", "labels")))
        others = self.about.get("others", 0) + int((~taken).sum())
        about = {**self.about, "others": others, "of_classes": digest_of(classes)}
        return type(self)(index, self.wnids, self.wnid[taken], self.number[taken], about)

    def labels(self, tar: str, classes: Sequence[str] | None) -> np.ndarray:
        """Class numbers, int64 (N,); `classes` None: positions in `wnids`. Raises ForeignError, naming a sample."""
        if classes is None:
            bad = self.wnid < 0
            problem = (
                "gives its class only as a number, which says nothing without a list: add --classes, with a text file "
                "of one WordNet id per line in the order of the numbers, or imagenet-1k, fall11, winter21-p, ... "
                "(`python -m data_prep labels --list`)"
            )
            found = self.wnid.astype(np.int64)
        else:
            at = {wnid: label for label, wnid in enumerate(classes)}
            told = np.array([at.get(wnid, -1) for wnid in self.wnids] + [-1], np.int64)[self.wnid]
            found = np.where(self.wnid < 0, self.number, told)
            bad = (found < 0) | (found >= len(classes))
            problem = (
                f"has a class that is none of the {len(classes):,} of --classes: give the list it was made with, or "
                "leave such samples out with --others skip"
            )
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            if self.wnid[row] < 0:
                numbers = self.number[self.wnid < 0]
                problem = problem if classes is None else _why_not_listed(numbers, len(classes))
            has = self.wnids[self.wnid[row]] if self.wnid[row] >= 0 else f"class number {self.number[row]}"
            raise ForeignError(f"{tar}: sample {str(self.index.keys[row])!r} ({has}) {problem}")
        return found

    def to_bytes(self, labels: np.ndarray) -> bytes:
        """An index file, with more arrays in it than readers look at."""
        index = ShardIndex(self.index.keys, self.index.offsets, self.index.sizes, labels)
        with np.load(io.BytesIO(index.to_bytes())) as arrays:
            parts = dict(arrays)
        file = io.BytesIO()
        wnids = np.array([wnid.encode() for wnid in self.wnids], "S9")
        about = np.frombuffer(json.dumps(self.about, sort_keys=True).encode(), np.uint8)
        np.savez(file, allow_pickle=False, **parts, wnids=wnids, wnid=self.wnid, number=self.number, about=about)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises KeyError for an index that another command wrote, other errors for one that is damaged."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            keys = np.char.decode(arrays["keys"], "ascii") if arrays["keys"].size else arrays["keys"]
            index = ShardIndex(keys, arrays["offsets"], arrays["sizes"], arrays["labels"])
            return cls(index, [w.decode() for w in arrays["wnids"].tolist()], arrays["wnid"], arrays["number"], about)


def _why_not_listed(numbers: np.ndarray, classes: int) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    advice = "give the list it was made with"
    if low >= 1 and high == classes:
        advice = "do they begin with 1? Then give a list with one line more at its top, n00000000, for a class 0"
    there = f"whose {classes:,} have the numbers 0 to {classes - 1}"
    return f"is not in --classes, {there}; here are {low} to {high}: {advice}"


def digest_of(classes: Sequence[str]) -> str:
    """Of a list of classes, in whatever order."""
    return hashlib.sha256("\n".join(sorted(classes)).encode()).hexdigest()[:32]
