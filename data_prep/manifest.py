"""What a built dataset is: `dataset.json` (the manifest) and one index beside each shard.

A dataset is a folder:

    dataset.json               label space, splits, files with counts, bytes and checksums, settings
    train-000000.tar           shard: `key.jpg`, `key.cls`, `key.json` for each sample
    train-000000.index.npz     where each `.jpg` lies inside the shard, so that readers can seek
    train.beton                optional: the same samples in the same order, for FFCV
    val-000000.tar ...
    _info.json                 splits, files and counts once more, as timm's reader wants them (`shards/info.py`)

The number of a sample in its split (`sample_id`) is its position in the concatenated shards; the shards, the
indexes and the `.beton` all agree on it.

This file is the contract between `data_prep` and `pipeline`, so it imports little: numpy, pydantic, and `storage.py`.
"""

import hashlib
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_prep.storage import DataPrepError, Folder, atomic_write, user_path

MANIFEST_NAME = "dataset.json"
FORMAT_VERSION = 2  # 1 had neither `key.cls` nor `_info.json`: it is read as before, `index --upgrade` adds them
DENSE = "dense"  # `kind` in the manifest of the other sort of data set: dense_set.py
SYNSET_PATTERN = re.compile(r"n\d{8}")  # a WordNet id of a noun: n01440764


class ManifestError(DataPrepError):
    """`dataset.json` or a shard index is missing, invalid, or does not fit the other files."""


def dataset_folder(path: str | Path) -> str:
    """The folder, or its URL, of a data set; that of its dataset.json, where a user gives the file."""
    folder = user_path(str(path)).rstrip("/") or "/"
    if folder == MANIFEST_NAME:
        return "."
    return folder.removesuffix(f"/{MANIFEST_NAME}") or "/"


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardEntry(_Frozen):
    """One file of samples. `bytes` is the file's size, `sha256` the checksum of all of it."""

    file: str
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("file")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not name or name != os.path.basename(name) or name in (".", ".."):
            raise ValueError(f"must be a file name inside the dataset folder, not {name!r}")
        return name


class BetonEntry(ShardEntry):
    """One FFCV file. `write_mode` is FFCV's (jpg, raw, proportion); max_* in pixels. `settings` says what decided its
    content, see BetonSettings; empty in files from before there was a choice: the shards' own JPEG bytes.
    """

    write_mode: str = "jpg"
    settings: dict[str, Any] = {}
    page_size_bytes: int = Field(gt=0)
    max_height: int = Field(gt=0)
    max_width: int = Field(gt=0)


class Split(_Frozen):
    """One split; `class_counts[label]` is the number of its samples in that class."""

    samples: int = Field(ge=0)
    class_counts: list[int]
    shards: list[ShardEntry]
    betons: list[BetonEntry] = []

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if sum(self.class_counts) != self.samples:
            raise ValueError(f"class_counts add up to {sum(self.class_counts)}, samples is {self.samples}")
        files: dict[str, list[Any]] = {"shards": list(self.shards), "betons": list(self.betons)}
        for kind, entries in files.items():
            total = sum(entry.samples for entry in entries)
            if total != self.samples and not (kind == "betons" and not entries):
                raise ValueError(f"the {kind} hold {total} samples together, samples is {self.samples}")
        return self


class Manifest(_Frozen):
    """The manifest. `synsets[label]` is a class's WordNet id; `dataset_id` hashes content and settings as they were
    built: an upgrade keeps it. `upgrading`: shards and indexes may not fit, until the upgrade has ended.
    """

    format_version: int = FORMAT_VERSION
    name: str
    dataset_id: str
    synsets: list[str]
    splits: dict[str, Split]
    settings: dict[str, Any] = {}
    upgrading: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.synsets)) != len(self.synsets):
            twice = [synset for synset, times in Counter(self.synsets).items() if times > 1]
            raise ValueError(f"synsets listed twice: {', '.join(twice[:5])}")
        for synset in self.synsets:
            if not SYNSET_PATTERN.fullmatch(synset):
                raise ValueError(f"{synset!r} in synsets is not a WordNet id (n and 8 digits)")
        for name, split in self.splits.items():
            if len(split.class_counts) != len(self.synsets):
                raise ValueError(
                    f"splits.{name}.class_counts has {len(split.class_counts)} entries, "
                    f"there are {len(self.synsets)} synsets"
                )
        return self

    @property
    def num_classes(self) -> int:
        return len(self.synsets)

    def split(self, name: str) -> Split:
        """The split `name`, or a ManifestError that names the splits there are."""
        if name not in self.splits:
            raise ManifestError(
                f"dataset {self.name!r} has no split {name!r}; it has {', '.join(sorted(self.splits)) or 'none'}"
            )
        return self.splits[name]

    def shards_folder(self, directory: str | Path) -> str:
        """Where the shards lie: in the data set's folder, or where the tars of others are that it has indexes of."""
        return str(self.settings.get("tars") or dataset_folder(directory))

    @classmethod
    def load(cls, directory: str | Path, *, unfinished: bool = False) -> Self:
        """Read `dataset.json` of a dataset folder. Raises ManifestError when it is missing or invalid, or when an
        upgrade of the data set has not ended (unless `unfinished`).
        """
        path, raw = read_manifest(directory)
        directory = dataset_folder(directory)
        if kind_of(raw) == DENSE:
            raise ManifestError(
                f"{directory} is a data set of masks or boxes, built by `python -m data_prep shard-dense`, and images "
                "of classes are wanted here: give a folder built by `shard` (masks and boxes are for `python -m "
                "pipeline segment` and `detect`)"
            )
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ManifestError(
                f"{path} has format_version {version}, this code reads {FORMAT_VERSION}: update the code"
            )
        try:
            found = cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file as a whole"
            raise ManifestError(
                f"{path} is not a valid manifest: {where}: {first['msg']} "
                f"({error.error_count()} problem(s)): rebuild the dataset with --force"
            ) from None
        if found.upgrading and not unfinished:
            raise ManifestError(
                f"{directory} is being upgraded, or that was interrupted: wait for it, or give `python -m data_prep "
                f"index --upgrade {directory}` again, which goes on"
            )
        return found

    def to_bytes(self) -> bytes:
        """The content of `dataset.json`; the same manifest always gives the same bytes."""
        told = self.model_dump(mode="json", exclude=None if self.upgrading else {"upgrading"})
        return (json.dumps(told, indent=1, sort_keys=True) + "\n").encode()

    def save(self, directory: str | Path) -> None:
        """Write `dataset.json` atomically into a local folder."""
        with atomic_write(Path(directory) / MANIFEST_NAME) as file:
            file.write(self.to_bytes())

    def load_index(self, directory: str | Path, shard: ShardEntry, data: bytes | None = None) -> "ShardIndex":
        """The index of one shard, checked against the manifest's count and bytes; `data`: its file, once read."""
        path = f"{dataset_folder(directory)}/{index_path(shard.file)}"
        index = ShardIndex.load(path) if data is None else ShardIndex.from_bytes(data, path)
        if len(index) != shard.samples:
            raise ManifestError(
                f"{path} lists {len(index)} samples, {MANIFEST_NAME} says {shard.samples} for {shard.file}: "
                "the files are of different builds; rebuild the dataset with --force"
            )
        if len(index) and int((index.offsets + index.sizes).max()) > shard.bytes:
            raise ManifestError(
                f"{path} points past the end of {shard.file} ({shard.bytes} bytes): rebuild with --force"
            )
        if len(index) and int(index.labels.max()) >= self.num_classes:
            raise ManifestError(f"{path} has label {int(index.labels.max())}, there are {self.num_classes} classes")
        return index


def read_manifest(directory: str | Path) -> tuple[str, Any]:
    """(path, parsed JSON) of the `dataset.json` of a data set of either kind. Raises ManifestError."""
    directory = dataset_folder(directory)
    path = f"{str(directory).rstrip('/')}/{MANIFEST_NAME}"
    try:
        return path, json.loads(read_file(path))
    except (FileNotFoundError, NotADirectoryError):
        place = Path(directory)
        what = "holds no" if place.is_dir() or "://" in str(directory) else "does not exist, so there is no"
        what = "is a file, and no folder with a" if place.is_file() else what
        raise ManifestError(
            f"{directory} {what} {MANIFEST_NAME}: give a folder built by `python -m data_prep shard`, "
            "or build it first (an interrupted build is finished by running the same command again)"
        ) from None
    except ValueError as error:
        raise ManifestError(f"{path} is not readable JSON ({error}): rebuild the dataset with --force") from None
    except Exception as error:  # each store has its own
        raise unreadable(path, error) from None


def kind_of(raw: Any) -> str:
    """What a parsed `dataset.json` describes: DENSE, or "" for images of classes, which were there first."""
    return str(raw.get("kind", "")) if isinstance(raw, dict) else ""


def unreadable(path: str | Path, error: Exception) -> ManifestError:
    """The error that says what a disk or a store said of a file."""
    text = " ".join(str(error).split()) or type(error).__name__
    return ManifestError(f"{path} cannot be read ({text}): see to the disk, or the network and the store")


def read_file(path: str | Path) -> bytes:
    """All bytes of a file, local or behind a URL."""
    if "://" not in str(path):
        return Path(path).read_bytes()
    folder, _, name = str(path).rpartition("/")
    return Folder(folder).read(name)


def index_path(shard_path: str | Path) -> Path:
    """`train-000000.tar` -> `train-000000.index.npz`, in the same folder."""
    return Path(shard_path).with_suffix(".index.npz")


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where the samples of one shard lie, in the shard's order.

    keys (N,) str; offsets (N,) int64, the first byte of the `.jpg` inside the tar; sizes (N,) int64, its
    bytes; labels (N,) int32, the class number in the manifest's synsets.
    """

    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        fields = {"keys": "U", "offsets": "int64", "sizes": "int64", "labels": "int32"}
        for name, dtype in fields.items():
            # An empty list has dtype float64 in numpy; the cast gives every index the same types.
            object.__setattr__(self, name, np.asarray(getattr(self, name)).astype(dtype))
        lengths = {name: getattr(self, name).shape for name in fields}
        if len(set(lengths.values())) != 1 or len(self.offsets.shape) != 1:
            raise ManifestError(f"the arrays of a shard index differ in length: {lengths}")
        if len(self) and min(int(getattr(self, name).min()) for name in ("offsets", "sizes", "labels")) < 0:
            raise ManifestError("a shard index holds a negative offset, size or label")

    def __len__(self) -> int:
        return self.offsets.shape[0]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an index file. Raises ManifestError naming the file when it is missing or damaged."""
        try:
            data = read_file(path)
        except FileNotFoundError:
            raise ManifestError(
                f"shard index {path} is missing: `python -m data_prep index --upgrade DIR` makes it again, of a data "
                "set built by `shard`; for tars of others, `index DIR --force`"
            ) from None
        except Exception as error:  # each store has its own
            raise unreadable(path, error) from None
        return cls.from_bytes(data, path)

    @classmethod
    def from_bytes(cls, data: bytes, path: str | Path) -> Self:
        """The index in the content of the file `path`. Raises ManifestError when it is damaged."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                # Keys are ASCII: stored as bytes they take a quarter of numpy's 4-byte characters.
                keys = np.char.decode(arrays["keys"], "ascii") if arrays["keys"].size else arrays["keys"]
                return cls(keys, arrays["offsets"], arrays["sizes"], arrays["labels"])
        except Exception as error:  # numpy raises zipfile, zlib, key and value errors for damaged files
            raise ManifestError(f"shard index {path} is damaged ({error}): rebuild the dataset with --force") from None

    def to_bytes(self) -> bytes:
        """The content of an index file; the same index always gives the same bytes (uncompressed, no times)."""
        file = io.BytesIO()
        np.savez(
            file,
            allow_pickle=False,
            keys=np.char.encode(self.keys, "ascii") if len(self) else np.empty(0, "S1"),
            offsets=self.offsets,
            sizes=self.sizes,
            labels=self.labels,
        )
        return file.getvalue()

    def save(self, path: str | Path) -> None:
        """Write the index atomically to a local path."""
        with atomic_write(path) as file:
            file.write(self.to_bytes())
