"""One WebDataset tar that somebody else wrote: its samples, what they say of their classes, and its index.

The tar is read once, from end to end, which gives its checksum, too. (Over a network that is also the faster way: a
jump from header to header costs a request, in which a stream brings several images.)
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from data_prep.manifest import ShardIndex, index_path
from data_prep.sources.layout import is_hidden
from data_prep.sources.streams import FileRange
from data_prep.sources.tar import BLOCK, Gap, Member, Tar
from data_prep.storage import DataPrepError, Folder, file_system

IMAGES = ("jpg", "jpeg", "png", "webp")  # in order of preference, where a sample has several
MAX_JSON_BYTES = 1 << 20  # what is larger holds more than a label
TOLD_SAMPLES = 5
READ_BYTES = 8 << 20
# WebDataset's rule: folder and name up to the first dot; what has no such name belongs to no sample.
MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
WNID_IN_NAME = re.compile(r"(?:^|/)(n\d{8})(?=[_./]|$)")


class ForeignError(DataPrepError):
    """The tars cannot be made a data set as they are, or not without being told more."""


@dataclass
class _Sample:
    offset: int = -1
    size: int = 0
    preference: int = len(IMAGES)
    wnid: str = ""
    number: int = -1
    extensions: set[str] = field(default_factory=set)

    @property
    def lacks(self) -> str:
        """What keeps it from being trained on."""
        return "no image" if self.offset < 0 else "" if self.wnid or self.number >= 0 else "no class"


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


class _Hashed(FileRange):
    """Reads a whole file without seeking, and takes its checksum."""

    def __init__(self, path: str, advance: Callable[[int], None]):
        super().__init__(path)
        self.sha256, self._hashed, self._advance = hashlib.sha256(), 0, advance

    def read(self, size: int) -> bytes:
        start = self.position
        data = super().read(size)
        fresh = data[max(0, self._hashed - start) :]  # some was put back
        self.sha256.update(fresh)
        self._hashed += len(fresh)
        self._advance(len(fresh))
        return data

    def skip(self, size: int) -> int:
        left = size
        while left > 0 and (data := self.read(min(left, READ_BYTES))):
            left -= len(data)
        return size - left


def tars_elsewhere(folder: Folder, at: Folder) -> str | None:
    """The folder of the tars, where their indexes are kept in another."""
    return folder.url if folder.url != at.url else None


def scan_tar(folder: Folder, name: str, skip_unlabelled: bool, advance: Callable[[int], None] = lambda _: None) -> Scan:
    """Read a tar to its end. Raises ForeignError where it is damaged, cut short, or has samples of no use."""
    samples: dict[str, _Sample] = {}
    last = ""
    with _Hashed(folder.join(name), advance) as reader:
        tar = Tar(reader)
        for member in tar:
            if isinstance(member, Gap):
                raise ForeignError(f"{folder.join(name)}: {member}: fetch or make the tar again")
            parts = MEMBER_NAME.fullmatch(member.name)
            hidden = is_hidden(member.name.rpartition("/")[0])  # the trash, or a notebook's copies
            if member.kind != "file" or parts is None or member.name.startswith("__") or hidden:
                continue
            key, extension = parts[1], parts[2].lower()
            sample = samples.setdefault(key, _Sample())
            if (key != last and sample.extensions) or extension in sample.extensions:
                raise ForeignError(
                    f"{folder.join(name)}: {member.name!r} at byte {member.offset} is of the key {key!r}, which stands "
                    f"before it with {', '.join(sorted(sample.extensions))}: a key may stand once in a tar, its files "
                    "next to each other"
                )
            last = key
            sample.extensions.add(extension)
            _take(sample, extension, member, tar)
        while reader.read(READ_BYTES):
            pass
        if reader.error is not None:
            raise ForeignError(f"{reader.error}: copy the tar again")
        if not samples and reader.position < 2 * BLOCK:
            raise ForeignError(
                f"{folder.join(name)} has {reader.position} bytes, not even a tar's end mark: copy it again"
            )
        about = {"bytes": reader.position, "sha256": reader.sha256.hexdigest()}
    for key, sample in samples.items():
        sample.wnid = sample.wnid or next(iter(WNID_IN_NAME.findall(key)), "")
    lacking = [(key, sample.lacks) for key, sample in samples.items() if sample.lacks]
    if lacking and not skip_unlabelled:
        if len(lacking) == len(samples):
            raise ForeignError(f"{folder.join(name)}: {_why_none(*lacking[0], samples[lacking[0][0]], len(samples))}")
        told = ", ".join(f"{key!r} ({lacks})" for key, lacks in lacking[:TOLD_SAMPLES])
        raise ForeignError(
            f"{folder.join(name)}: {len(lacking):,} of {len(samples):,} samples have no image or no class: {told}"
            f"{', ...' if len(lacking) > TOLD_SAMPLES else ''}: --skip-unlabelled leaves such out"
        )
    odd = next((key for key in samples if not key.isascii()), None)
    if odd is not None:
        raise ForeignError(f"{folder.join(name)}: key {odd!r} is not ASCII: write the tar again with plain names")
    used = {key: sample for key, sample in samples.items() if not sample.lacks}
    wnids = sorted({sample.wnid for sample in used.values()} - {""})
    at = {wnid: number for number, wnid in enumerate(wnids)} | {"": -1}
    rows = list(used.values())
    index = ShardIndex(
        np.array(list(used), str),
        np.array([sample.offset for sample in rows], np.int64),
        np.array([sample.size for sample in rows], np.int64),
        np.zeros(len(rows), np.int32),
    )
    wnid = np.array([at[sample.wnid] for sample in rows], np.int32)
    number = np.array([sample.number for sample in rows], np.int64)
    return Scan(index, wnids, wnid, number, {**about, "left_out": len(lacking)})


def _why_none(key: str, lacks: str, sample: _Sample, samples: int) -> str:
    """Of a tar in which no sample can be trained on, by one of them."""
    files = sorted(sample.extensions)
    told = f"{', '.join(files[:TOLD_SAMPLES])}{', ...' if len(files) > TOLD_SAMPLES else ''}"
    rule = f"an image is .{', .'.join(IMAGES)}, a class is a number in .cls, or a WordNet id in the key or the .json"
    if any("." in extension for extension in files):
        rule = "a key ends at its first dot: write the tar again with names that have no other"
    return f"none of its {samples:,} samples has an image and a class; {key!r} ({lacks}) holds {told}: {rule}"


def _take(sample: _Sample, extension: str, member: Member, tar: Tar) -> None:
    """Note what a member says of its sample."""
    if extension in IMAGES[: sample.preference]:
        sample.offset, sample.size, sample.preference = member.data_offset, member.size, IMAGES.index(extension)
    elif extension == "cls":
        text = (tar.data() or b"").strip()
        sample.number = int(text) if text.isdigit() and len(text) < 10 else -1
    elif extension == "json" and member.size <= MAX_JSON_BYTES:
        try:
            told = json.loads(tar.data() or b"")
        except ValueError:
            return
        if not isinstance(told, dict):
            return
        names = [told[field] for field in ("wnid", "synset", "filename") if isinstance(told.get(field), str)]
        sample.wnid = next((found[0] for name in names if (found := WNID_IN_NAME.findall(name))), "")
        label = told.get("label")
        if sample.number < 0 and type(label) is int and 0 <= label < 1 << 31:
            sample.number = label


def is_indexed(folder: Folder, name: str, size: int, skip: bool, at: Folder, only: Sequence[str] | None = None) -> bool:
    """Whether a tar has an index of ours, in the folder `at`, that fits and is not older; `only`: of these classes."""
    file = str(index_path(name))
    try:
        scan = Scan.from_bytes(at.read(file))
    except FileNotFoundError:
        return False
    except KeyError:
        raise ForeignError(
            f"{at.join(file)} is there already, and not by this command: finish the `shard` build it is of, or "
            "remove it"
        ) from None
    except Exception:  # numpy raises zipfile, zlib and value errors for damaged files
        return False
    if scan.about["bytes"] != size or (scan.about["left_out"] and not skip):
        return False
    if scan.about.get("tars") != tars_elsewhere(folder, at):
        return False
    if "of_classes" in scan.about and (only is None or scan.about["of_classes"] != digest_of(only)):
        return False
    try:
        (system, root), (at_system, at_root) = file_system(folder.url), file_system(at.url)
        return bool(at_system.modified(f"{at_root}/{file}") >= system.modified(f"{root}/{name}"))
    except NotImplementedError:  # a store that tells no times
        return True
