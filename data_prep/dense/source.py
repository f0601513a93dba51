"""What a source holds, before any image is opened: classes, and of each split its images with what is said of them."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data_prep.dense.tree import DenseSourceError, Stat, Tree

MAX_KEY_CHARS = 80  # leaves room for the extension in the 100 bytes of a plain tar header
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Item:
    """One image. `image` and `mask` are names in the split's trees, None where there is no such file; sizes are those
    that the annotations give, None where they do not. `annotations`: as in the source.
    """

    key: str
    image_id: int
    file_name: str
    image: str | None
    mask: str | None = None
    scene: str | None = None
    width: int | None = None
    height: int | None = None
    annotations: tuple[dict[str, Any], ...] = ()


@dataclass
class SourceSplit:
    """One split, its items in the order of image ids. `strays`: ledger rows of annotations that are of no image or
    class, see `ledger.row`.
    """

    name: str
    images: Tree
    items: list[Item]
    masks: Tree | None = None
    image_bytes: int = 0
    strays: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Source:
    """A source; `position in classes` is the label, `category_ids[label]` its number in the source."""

    kind: str
    task: str
    path: str
    classes: list[str]
    category_ids: list[int]
    splits: list[SourceSplit]
    fingerprint: str

    def description(self) -> list[str]:
        """Lines that say what was found."""
        lines = [f"{self.path}: {self.kind}, {len(self.classes)} classes, such as {'; '.join(self.classes[:3])}"]
        for split in self.splits:
            told = [f"{len(split.items):,} images ({split.image_bytes / 1e6:,.1f} MB)"]
            missing = sum(item.image is None for item in split.items)
            if missing:
                told.append(f"{missing:,} of them missing")
            if self.task == "semantic":
                told.append(f"{sum(item.mask is not None for item in split.items):,} masks")
            else:
                annotations = sum(len(item.annotations) for item in split.items)
                empty = sum(not item.annotations for item in split.items)
                told.append(f"{annotations:,} annotations, {empty:,} images without any")
            lines.append(f"  {split.name}: {', '.join(told)}; from {split.images}")
        return lines


def key_of(file_name: str) -> str:
    """The sample key that a file's name gives; different names give different keys."""
    stem = os.path.splitext(file_name)[0]
    # WebDataset takes everything after the first dot for the extension, and a slash for a folder.
    key = re.sub(r"[^A-Za-z0-9_-]", "_", stem)
    if key == stem and len(key) <= MAX_KEY_CHARS:
        return key
    suffix = f"-{hashlib.blake2b(stem.encode(), digest_size=8).hexdigest()}"
    return key[: MAX_KEY_CHARS - len(suffix)] + suffix


def refuse_same_keys(items: Iterable[Item], where: str) -> None:
    """Raise DenseSourceError where two images would be one sample."""
    seen: dict[str, str] = {}
    for item in items:
        other = seen.setdefault(item.key, item.file_name)
        if other != item.file_name:
            raise DenseSourceError(f"{where}: {other} and {item.file_name} differ in their ending alone: rename one")


def listing_digest(files: dict[str, Stat]) -> str:
    """A hash of names and sizes (of a zip, contents) of files."""
    digest = hashlib.sha256()
    for name, stat in sorted(files.items()):
        digest.update(f"{name}\0{stat.bytes}\0{stat.mark}\n".encode())
    return digest.hexdigest()


def fingerprint_of(parts: Any) -> str:
    """One hash of what decides a source's content, of whatever JSON holds."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
