"""What a checkpoint is measured on: its own validation split, another data set, or a published test set as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch

from data_prep.labels.spaces import imagenet_1k_synsets, label_space, map_labels
from data_prep.manifest import MANIFEST_NAME, Manifest, ManifestError
from data_prep.storage import is_url
from pipeline.config.load import Config
from pipeline.data.image_folder import VAL_NAME, FolderReader, ImageFolder, read_image_folder
from pipeline.data.loader import seekable_batches, validation_batches
from pipeline.data.opened import open_reader, parts_of
from pipeline.data.shards import DataError
from pipeline.data.stream.manifest import load_manifest
from pipeline.data.views import Batch
from pipeline.ranks.collectives import Ranks

# Test sets of 200 classes of ImageNet-1K, by timm's lists: scored among those alone, as published.
_SUBSETS = ("imagenet-a", "imagenet-r")
_REAL_IMAGES = 50_000

Encoded = Callable[[Sequence[int]], Sequence[bytes | DataError]]


@dataclass(frozen=True)
class EvaluationSet:
    """Images with labels over the classes `synsets`, among which predictions are made.

    labels: (size, L) int64 by sample, -1 where an image has fewer, for ReaL; None: one an image, which the batches
    have. batches: of one rank, every sample once over all. encoded: image files by sample, to be seen again; None where
    that cannot be had. sources: path of each sample below the folder, for plain folders.
    """

    name: str
    path: str
    dataset_id: str | None
    synsets: list[str]
    size: int
    labels: np.ndarray | None
    batches: Callable[[Ranks], Iterator[Batch]]
    encoded: Encoded | None
    sources: list[str] | None


def open_set(config: Config, data: str | None, real: str | None) -> EvaluationSet:
    """The set at `data` (None: that of the configuration). real: "" for timm's copy of the ReaL labels, or their file.

    Raises ManifestError, DataError, ConfigError.
    """
    if data is not None and not is_url(data) and Path(data).is_dir() and not (Path(data) / MANIFEST_NAME).exists():
        return _of_folder(config, read_image_folder(Path(data)), real)
    manifest = load_manifest(config.data)
    shown = config.data.shown_path
    if "val" not in manifest.splits or not manifest.split("val").samples:
        raise ManifestError(f"{shown} has no validation images: give another data set with --data")
    labels, synsets = None, manifest.synsets
    if real is not None:
        labels, synsets = _real_labels(real, shown, _keys(config, manifest)), imagenet_1k_synsets()
    encoded: Encoded | None = None
    if config.data.reader == "indexed":
        reader = open_reader(config.data, manifest, "val")
        encoded = reader.encoded_many
    return EvaluationSet(
        manifest.name,
        shown,
        manifest.dataset_id,
        synsets,
        manifest.split("val").samples,
        labels,
        lambda ranks: validation_batches(config, manifest, ranks),
        encoded,
        None,
    )


def _of_folder(config: Config, folder: ImageFolder, real: str | None) -> EvaluationSet:
    labels = None
    if real is not None:
        labels = _real_labels(real, str(folder.root), [file.stem for file in folder.files])
        folder = ImageFolder(folder.root, imagenet_1k_synsets(), folder.files, labels[:, 0], folder.others)
    elif (folder.labels < 0).any():
        raise DataError(
            f"{folder.root} has images of ImageNet-1K's val without their labels: sort them into a folder a class, "
            f"build a data set of them (`python -m data_prep shard` knows the devkit), or score ReaL's labels (--real)"
        )
    synsets = scored_classes(folder.synsets)
    numbers = map_labels(synsets, folder.synsets).source_index  # of each class of the folder
    if real is None:
        folder = ImageFolder(folder.root, synsets, folder.files, numbers[folder.labels], folder.others)
    reader = FolderReader(folder)
    return EvaluationSet(
        folder.root.name if folder.root.name != "val" else folder.root.resolve().parent.name,
        str(folder.root),
        None,
        synsets,
        len(folder),
        labels,
        lambda ranks: seekable_batches(config, reader, np.arange(len(folder)), ranks),
        reader.encoded_many,
        [str(file.relative_to(folder.root)) for file in folder.files],
    )


def scored_classes(found: Sequence[str]) -> list[str]:
    """Among which classes the images of these are scored: a part of ImageNet-1K is still one among 1,000."""
    for name in _SUBSETS:
        if set(found) == set(label_space(name)):
            return label_space(name)
    all_1k = imagenet_1k_synsets()
    return all_1k if set(found) <= set(all_1k) else list(found)


def _keys(config: Config, manifest: Manifest) -> list[str]:
    if config.data.reader != "indexed":
        raise DataError("ReaL's labels go by the names of images, which streams do not tell: give --data a data set")
    return [
        str(key)
        for data, part in parts_of(config.data, manifest)
        for entry in part.split("val").shards
        for key in part.load_index(data.folder, entry).keys
    ]


def _real_labels(real: str, shown: str, names: Sequence[str]) -> np.ndarray:
    """(N, L) numbers in ImageNet-1K of the images `names`, -1 where there are fewer, or none. Raises DataError."""
    path = Path(real) if real else Path(timm.__file__).parent / "data" / "_info" / "imagenet_real_labels.json"
    try:
        all_labels = json.loads(path.read_text(encoding="utf-8"))
        lists = [sorted({int(number) for number in each}) for each in all_labels]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}: give real.json, or --real alone") from None
    except (ValueError, TypeError):
        lists = []
    if len(lists) != _REAL_IMAGES or not all(0 <= number < 1000 for each in lists for number in each):
        raise DataError(
            f"{path} is not ReaL's real.json, 50,000 lists of class numbers: fetch it again, or --real alone"
        )
    matches = [VAL_NAME.search(name) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    if len(numbers) < len(names) or not all(1 <= number <= _REAL_IMAGES for number in numbers):
        other = next((name for name, match in zip(names, matches, strict=True) if not match), "a number above 50,000")
        raise DataError(
            f"{shown} has images that are not of ImageNet-1K's val ({other}): ReaL has labels for ILSVRC2012_val_..."
        )
    width = max([1, *(len(lists[number - 1]) for number in numbers)])
    labels = np.full((len(names), width), -1, np.int64)
    for row, number in zip(labels, numbers, strict=True):
        row[: len(lists[number - 1])] = lists[number - 1]
    if not (labels[:, 0] >= 0).any():
        raise DataError(f"{shown} has no image that ReaL has a label of: there is nothing to score")
    return labels


@dataclass(frozen=True)
class Selection:
    """From the logits of a head to those of a set's classes, by WordNet id; -inf where the head has no such class."""

    columns: torch.Tensor  # (classes of the set,) int64, -1: none
    unmatched: list[str]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, classes of the head) -> (B, classes of the set)."""
        columns = self.columns.to(logits.device)
        return logits[:, columns.clamp(min=0)].masked_fill(columns < 0, -torch.inf)


def select(head: Sequence[str], scored: EvaluationSet) -> Selection:
    """Raises DataError where the head knows none of the classes."""
    mapping = map_labels(head, scored.synsets)
    if not mapping.matched:
        raise DataError(
            f"{scored.path} has {len(scored.synsets):,} classes, and none of them is among the {len(head):,} of the "
            f"checkpoint: give another --data"
        )
    return Selection(torch.from_numpy(mapping.source_index), mapping.unmatched)
