"""Images in plain folders, in the layouts in which ImageNet's test sets are published.

a folder a class, by WordNet id        ImageNet-1K's val (also as DIR/val), ImageNet-A, ImageNet-R
a folder a class, by class number      ImageNet-V2: 0 ... 999, in the order of ImageNet-1K
no folders                             ImageNet-1K's val as its tar has it: ILSVRC2012_val_00000001.JPEG
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.foreign.classes import IMAGES
from data_prep.labels.spaces import imagenet_1k_synsets
from data_prep.manifest import SYNSET_PATTERN
from pipeline.data.order import MicroBatch
from pipeline.data.shards import DataError

VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")  # its number, from 1


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, classes in the order of `synsets`; labels (N,) int64, -1: the layout does not say.

    others: files that are no images by their names, and are left alone.
    """

    root: Path
    synsets: list[str]
    files: list[Path]
    labels: np.ndarray
    others: int

    def __len__(self) -> int:
        return len(self.files)


def read_image_folder(root: Path) -> ImageFolder:
    """The images under `root`. Raises DataError where it has none of the layouts."""
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error.strerror}: give a data set or a folder of images") from None
    names = [path.name for path in folders]
    if "val" in names and not any(map(SYNSET_PATTERN.fullmatch, names)):
        return read_image_folder(root / "val")
    if not folders:
        files, others = _images(root)
        if not files or not all(VAL_NAME.fullmatch(file.stem) for file in files):
            raise DataError(
                f"{root} is neither a data set (dataset.json) nor a folder with a folder of images for each class, "
                f"named by WordNet id (n01440764) or, as ImageNet-V2 has them, by number: name one that is"
            )
        return ImageFolder(root, imagenet_1k_synsets(), files, np.full(len(files), -1), others)
    if all(map(SYNSET_PATTERN.fullmatch, names)):
        synsets, labels = names, list(range(len(names)))
    elif all(map(_is_number, names)):
        synsets, labels = imagenet_1k_synsets(), [int(name) for name in names]  # by name 10 comes before 2
    else:
        numbered = sum(map(str.isdecimal, names)) * 2 > len(names)  # ImageNet-V2, but for some: those are what is odd
        fits = _is_number if numbered else SYNSET_PATTERN.fullmatch
        odd = next(name for name in names if not fits(name))
        raise DataError(
            f"{root} holds the folder {odd}, which is no class: each has to be named by WordNet id (n01440764), or "
            f"each by its number in ImageNet-1K (0 to 999)"
        )
    found, of_each, others = [], [], 0
    for folder, label in zip(folders, labels, strict=True):
        files, left = _images(folder)
        found += files
        of_each += [label] * len(files)
        others += left
    if not found:
        raise DataError(f"{root} has {len(folders)} folders of classes, and no image in them: unpack its archive again")
    return ImageFolder(root, list(synsets), found, np.array(of_each, np.int64), others)


def _is_number(name: str) -> bool:
    return name.isdecimal() and int(name) < len(imagenet_1k_synsets())


def _images(folder: Path) -> tuple[list[Path], int]:
    """(images by name, number of other files that are not hidden)."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
    images = [path for path in files if path.suffix[1:].lower() in IMAGES]
    return images, len(files) - len(images)


class FolderReader:
    """`EncodedReader` of an ImageFolder, for evaluation: samples are numbered as its files are."""

    random_access = True
    remote = None
    fetch_threads: int | None = None
    shard_count = 0

    def __init__(self, folder: ImageFolder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def encoded_many(self, samples: Sequence[int] | np.ndarray) -> list[bytes | DataError]:
        return [self._encoded(int(sample)) for sample in samples]

    def encoded_batch(self, micro: MicroBatch) -> list[bytes | DataError]:
        return self.encoded_many(micro.samples)

    def label_of(self, sample: int, data: bytes) -> int:
        return int(self.folder.labels[sample])

    def damaged(self, sample: int, reason: object, data: bytes = b"") -> DataError:
        return DataError(f"{self.folder.files[sample]} does not decode ({reason}): unpack it from its archive again")

    def ahead(self, shards: Sequence[int]) -> None:
        """Nothing to fetch."""

    def close(self) -> None:
        """Nothing is held open."""

    def _encoded(self, sample: int) -> bytes | DataError:
        try:
            return self.folder.files[sample].read_bytes()
        except OSError as error:
            return DataError(f"{self.folder.files[sample]} cannot be read: {error.strerror}")
