"""What feeds the ranks of a run, of whichever task: the loader that its configuration asks for; what speeds it up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_prep.dense_set import DenseManifest
from data_prep.manifest import Manifest
from pipeline.config.dense import SegmentConfig
from pipeline.config.detect import DetectConfig
from pipeline.config.load import Config
from pipeline.config.run import RunConfig
from pipeline.data.loader import training_batches
from pipeline.data.opened import training_order
from pipeline.data.stream.manifest import load_manifest
from pipeline.dense.data import DenseReader, training_crops
from pipeline.dense.opened import check_files, dense_order, open_dense
from pipeline.detection.data import training_views
from pipeline.detection.opened import open_instances
from pipeline.ranks.collectives import Ranks
from pipeline.training.task import Batch

_INDEXES = 32  # of so many shards the images' sizes are looked up
_NO_END = 1 << 40  # steps


class Feed(Protocol):
    """Made by `feed_of`; a rank's process is given it whole."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def how(self) -> str:
        """In words, what loads: format and workers."""

    @property
    def processes(self) -> int:
        """Of a rank, that make batches ahead."""

    def batches(self, ranks: Ranks) -> Iterator[Batch]:
        """A rank's training batches without end, of the largest images of the run. Raises DataError."""

    def bytes_per_image(self, samples: np.ndarray) -> float:
        """Of the files of images by their sample ids; nan where it is not known."""

    @property
    def is_remote(self) -> bool:
        """Whether the shards come over a network."""

    @property
    def how_to_check(self) -> str:
        """What to do where images are bad."""

    def faster(self) -> list[str]:
        """What else to change where the cores do not suffice, the cheapest first; ratios: tests/bench/RESULTS.md."""


def feed_of(config: RunConfig) -> Feed:
    """Opens its data. Raises ConfigError, DataError, ManifestError."""
    if isinstance(config, Config):
        images = load_manifest(config.data, count_val=False)
        training_order(config, images)
        return ImageFeed(config, images)
    if not isinstance(config, SegmentConfig | DetectConfig):
        raise TypeError(type(config).__name__)
    manifest = open_dense(config) if isinstance(config, SegmentConfig) else open_instances(config)
    dense_order(config, manifest)
    check_files(config.data.path, manifest, "train")
    return DenseFeed(config, manifest)


@dataclass(frozen=True)
class ImageFeed:
    """Images of classes."""

    config: Config
    manifest: Manifest

    @property
    def how(self) -> str:
        data = self.config.data
        which = f"{data.format}{', streamed' if data.reader == 'stream' else ''}"
        return f"{which}, augment.where {self.config.augment.where}, workers_per_rank {data.workers_per_rank}"

    @property
    def processes(self) -> int:
        host = self.config.data.format == "webdataset" and self.config.augment.where == "host"
        return self.config.data.workers_per_rank if host else 1

    def batches(self, ranks: Ranks) -> Iterator[Batch]:
        order = training_order(self.config, self.manifest)
        first_step = max(self.config.data.resolution_by_epoch or {0: 0}) * order.steps_per_epoch
        return training_batches(self.config, self.manifest, order, ranks, first_step, _NO_END)

    def bytes_per_image(self, samples: np.ndarray) -> float:
        data, split = self.config.data, self.manifest.split("train")
        if data.format == "ffcv":
            return split.betons[0].bytes / split.betons[0].samples
        if data.reader == "stream" or len(data.sets) > 1:  # with all else that is in its tars
            return sum(entry.bytes for entry in split.shards) / split.samples or math.nan
        return _mean_bytes(
            samples,
            [entry.samples for entry in split.shards],
            lambda shard: self.manifest.load_index(data.folder, split.shards[shard]).sizes,
        )

    @property
    def is_remote(self) -> bool:
        return self.config.data.is_remote

    @property
    def how_to_check(self) -> str:
        return self.config.data.how_to_check

    def faster(self) -> list[str]:
        data = self.config.data
        if self.config.augment.where == "host":
            first = ["augment.where=device: a third to a fifth of the host's work is left, the GPU does the rest"]
        elif data.reader == "stream":
            first = ["data.reader=indexed, where the shards can be indexed: tars are parsed once, not in every epoch"]
        elif data.format == "ffcv":
            first = ["data.format=webdataset: of JPEG files 1.7 times as fast as FFCV"]
        elif not data.is_remote:
            first = [
                "data.format=ffcv of pixels (shard --format ffcv --beton-mode raw): 1.1 to 1.2 times as fast, many GB "
                "more"
            ]
        else:
            first = []
        return [*first, f"smaller images, where they are larger: shard --short-side {round(data.resolution * 4 / 3)}"]


@dataclass(frozen=True)
class DenseFeed:
    """Images with masks or objects, from local shards by worker processes: of a segmentation, or of a detection."""

    config: SegmentConfig | DetectConfig
    manifest: DenseManifest

    @property
    def how(self) -> str:
        return f"workers_per_rank {self.config.data.workers_per_rank}"

    @property
    def processes(self) -> int:
        return self.config.data.workers_per_rank

    @property
    def is_remote(self) -> bool:
        return False

    @property
    def how_to_check(self) -> str:
        return f"to check: `python -m data_prep verify {self.config.data.path}`"

    def batches(self, ranks: Ranks) -> Iterator[Batch]:
        config, order = self.config, dense_order(self.config, self.manifest)
        reader = DenseReader(config.data.path, self.manifest, "train")
        if isinstance(config, DetectConfig):
            return training_views(config, reader, order, ranks, 0, _NO_END)
        return training_crops(config, reader, order, ranks, 0, _NO_END)

    def bytes_per_image(self, samples: np.ndarray) -> float:
        split = self.manifest.split("train")
        return _mean_bytes(
            samples,
            [entry.samples for entry in split.shards],
            lambda shard: self.manifest.load_index(self.config.data.path, split.shards[shard]).image_bytes,
        )

    def faster(self) -> list[str]:
        masks = isinstance(self.config, DetectConfig) and self.config.model.masks
        return ["model.masks=false, where boxes are enough: masks are decoded and cut here"] if masks else []


def _mean_bytes(samples: np.ndarray, counts: Sequence[int], sizes_of: Callable[[int], np.ndarray]) -> float:
    """Of samples of shards of so many each, as far as a few of the shards tell."""
    ends = np.cumsum(counts)
    shards = np.searchsorted(ends, samples, side="right")
    sizes = [
        sizes_of(shard)[samples[shards == shard] - (ends[shard] - counts[shard])]
        for shard in np.unique(shards)[:_INDEXES].tolist()
    ]
    return float(np.concatenate(sizes).mean())
