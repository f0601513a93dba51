"""Images with their masks or objects: from the shards of a dense data set, by seeks; training crops of the former.

The order of training is that of `pipeline/data/order.py`, so a step has the same samples on any number of ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from data_prep.dense_set import DenseIndex, DenseManifest
from data_prep.images.pil import decode_png_labels
from data_prep.manifest import ManifestError
from pipeline.config.dense import SegmentConfig
from pipeline.data.decode import decode_rgb
from pipeline.data.keyed import view_keys
from pipeline.data.loader import worker_batches
from pipeline.data.mixture import TrainingOrder
from pipeline.data.order import MicroBatch
from pipeline.data.shards import DataError
from pipeline.data.views import Batch
from pipeline.dense.augment import training_crop
from pipeline.dense.opened import check_files
from pipeline.ranks.collectives import Ranks

_Item = TypeVar("_Item")


class Labelled(NamedTuple):
    """An image, uint8 (3, H, W), and its mask, uint8 (H, W): a label for each pixel, 255 where none counts."""

    image: torch.Tensor
    mask: torch.Tensor
    sample: int


class Annotated(NamedTuple):
    """An image, uint8 (3, H, W), the number that its source gives it, and its objects as `dense_set` describes them."""

    image: torch.Tensor
    image_id: int
    annotations: list[dict[str, Any]]
    sample: int


class DenseReader:
    """The samples of one split by their ids (positions in the concatenated shards), from local files.

    Raises DataError at once where a shard is missing or not of the size that the manifest says.
    """

    def __init__(self, folder: str, manifest: DenseManifest, split: str) -> None:
        self.folder, self.manifest, self.entries = Path(folder), manifest, manifest.split(split).shards
        self._ends = np.cumsum([entry.samples for entry in self.entries])
        self._files: dict[int, int] = {}
        check_files(folder, manifest, split)
        self._index = lru_cache(maxsize=64)(self._load_index)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def labelled(self, sample: int) -> Labelled:
        """An image and its mask, of a semantic set, decoded. Raises DataError."""
        with self._telling(sample):
            pixels = decode_rgb(self._member(sample, "image"))
            mask = decode_png_labels(self._member(sample, "mask"))
        if mask.shape != pixels.shape[:2]:
            raise DataError(
                f"{self.describe(sample)}: its image is {pixels.shape[1]}x{pixels.shape[0]}, its mask "
                f"{mask.shape[-1]}x{mask.shape[0]}: shard the data again"
            )
        return Labelled(torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(mask), sample)

    def annotated(self, sample: int) -> Annotated:
        """An image, decoded, and the objects in it, of an instance set. Raises DataError."""
        with self._telling(sample):
            pixels = decode_rgb(self._member(sample, "image"))
            told = json.loads(self._member(sample, "json"))
            image_id, objects, height, width = (told[key] for key in ("image_id", "annotations", "height", "width"))
        if (height, width) != pixels.shape[:2]:
            raise DataError(
                f"{self.describe(sample)}: its image is {pixels.shape[1]}x{pixels.shape[0]}, its objects are those of "
                f"{width}x{height}: shard the data again"
            )
        return Annotated(torch.from_numpy(pixels).permute(2, 0, 1), image_id, objects, sample)

    @contextmanager
    def _telling(self, sample: int) -> Iterator[None]:
        """What goes wrong in reading a sample, by where it lies."""
        try:
            yield
        except DataError:  # of an index, which tells where itself
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.describe(sample)} cannot be read: {error}; `python -m data_prep verify {self.folder}` lists "
                f"what cannot"
            ) from None

    def close(self) -> None:
        """Close the shards; they are opened again where that is asked for."""
        while self._files:
            os.close(self._files.popitem()[1])

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages."""
        shard, place, index = self._find(sample)
        return f"shard {self.folder / self.entries[shard].file}: sample {str(index.keys[place])!r} (id {sample})"

    def _find(self, sample: int) -> tuple[int, int, DenseIndex]:
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, sample - int(self._ends[shard]) + self.entries[shard].samples, self._index(shard)

    def _load_index(self, shard: int) -> DenseIndex:
        try:
            return self.manifest.load_index(self.folder, self.entries[shard])
        except ManifestError as error:
            raise DataError(str(error)) from None

    def _member(self, sample: int, part: str) -> bytes:
        """The bytes of a sample's "image", "mask" or "json"."""
        shard, place, index = self._find(sample)
        offset, size = (int(getattr(index, f"{part}_{what}")[place]) for what in ("offset", "bytes"))
        if shard not in self._files:
            self._files[shard] = os.open(self.folder / self.entries[shard].file, os.O_RDONLY)
        data = os.pread(self._files[shard], size, offset)
        if len(data) != size:
            raise OSError(f"the shard ends after {len(data)} of {size} bytes")
        return data


class _Crops(Dataset[Any]):
    """Whole micro-batches of training crops, one at a time in each worker process."""

    def __init__(self, config: SegmentConfig, reader: DenseReader) -> None:
        self.config, self.reader = config, reader

    def __getitems__(self, micro: MicroBatch) -> Batch | DataError:
        try:
            drawn = [self.reader.labelled(int(sample)) for sample in micro.samples]
        except DataError as error:
            return error
        keys, side = view_keys(self.config.seed, micro.views).tolist(), self.config.data.resolution
        crops = [
            training_crop(each.image, each.mask, self.config.augment, side, key)
            for each, key in zip(drawn, keys, strict=True)
        ]
        images, masks = (torch.stack(each) for each in zip(*crops, strict=True))
        return Batch(images, masks, torch.from_numpy(micro.samples), torch.from_numpy(micro.views))


class _Whole(Dataset[Any]):
    """Samples as they are; asked for one by one."""

    def __init__(self, reader: DenseReader, read: Callable[[int], Any]) -> None:
        self.reader, self.read = reader, read

    def __getitems__(self, samples: Sequence[int]) -> Any:
        (sample,) = samples
        try:
            return self.read(sample)
        except DataError as error:
            return error


def training_crops(
    config: SegmentConfig, reader: DenseReader, order: TrainingOrder, ranks: Ranks, first_step: int, last_step: int
) -> Iterator[Batch]:
    """Micro-batches of one rank for the run's steps first_step .. last_step - 1, across epochs.

    Of a Batch, images are uint8 (B, 3, S, S) and labels the masks, uint8 (B, S, S). Raises DataError.
    """
    micro = config.train.micro_batch
    micros = order.micro_batches(first_step, last_step, ranks.rank, ranks.count, micro)
    return worker_batches(_Crops(config, reader), config.data.workers_per_rank, batch_sampler=micros)


def validation_images(config: SegmentConfig, reader: DenseReader, ranks: Ranks) -> Iterator[Labelled]:
    """Every validation image with its mask: see `each_once`."""
    return each_once(reader, reader.labelled, config.data.workers_per_rank, ranks)


def each_once(reader: DenseReader, read: Callable[[int], _Item], workers: int, ranks: Ranks) -> Iterator[_Item]:
    """What `read`, a method of the reader, gives of each sample exactly once over all ranks: rank r takes r, r + R,
    r + 2R, ... Raises DataError.

    Ranks may yield different numbers of images: hold no collective inside the loop over them.
    """
    mine = [[sample] for sample in range(ranks.rank, len(reader), ranks.count)]
    yield from worker_batches(_Whole(reader, read), workers, batch_sampler=mine)
