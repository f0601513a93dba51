"""Batches for one rank, in the order of `order.py`, from either file format.

Both formats yield the same sample ids in the same batches; the webdataset reader decodes with PIL in worker processes,
the ffcv reader with FFCV in one worker process (see `beton.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from data_prep.manifest import Manifest
from pipeline.config import Config
from pipeline.data.augment import evaluation_transform, seed_sample, training_transform
from pipeline.data.beton import EvaluationBeton, TrainingBeton, beton_path
from pipeline.data.order import SampleOrder
from pipeline.data.shards import DataError, ShardImages, load_labels

_SILENT_SECONDS = 600  # a worker that yields nothing for so long is dead or hangs; FFCV compiles for up to a minute


class Batch(NamedTuple):
    """images float32 (B, 3, H, W), normalised; labels int64 (B,); samples int64 (B,), the sample ids."""

    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `count`."""

    rank: int = 0
    count: int = 1


def training_batches(
    config: Config, manifest: Manifest, order: SampleOrder, ranks: Ranks, first_step: int, last_step: int
) -> Iterator[Batch]:
    """Micro-batches of one rank for optimizer steps first_step .. last_step - 1, across epochs.

    Raises DataError when a sample cannot be read or the workers stop answering.
    """
    crop, rest = training_transform(config.augment, config.data.resolution)
    source: Dataset[Any]
    if config.data.format == "ffcv":
        path = beton_path(config.data.path, manifest, "train")
        labels = load_labels(config.data.path, manifest, "train")
        source = TrainingBeton(path, labels, config, order, ranks.rank, ranks.count, first_step, last_step, rest)
        return _beton_batches(source)
    schedule = order.micro_batches(first_step, last_step, ranks.rank, ranks.count, config.train.micro_batch)
    # Items carry the epoch, since augmentation is keyed by it.
    items = ([(epoch, int(sample)) for sample in samples] for epoch, samples in schedule)
    images = ShardImages(config.data.path, manifest, "train")
    return _shard_batches(_Augmented(images, Compose([crop, rest]), config.seed), items, config)


def validation_batches(config: Config, manifest: Manifest, ranks: Ranks) -> Iterator[Batch]:
    """Every validation sample exactly once over all ranks: rank r takes samples r, r + R, r + 2R, ...

    Ranks may yield different numbers of batches: hold no collective inside the loop over them.
    """
    mine = np.arange(ranks.rank, manifest.split("val").samples, ranks.count)
    batches = [mine[i : i + config.evaluate.micro_batch] for i in range(0, len(mine), config.evaluate.micro_batch)]
    if config.data.format == "ffcv":
        path = beton_path(config.data.path, manifest, "val")
        labels = load_labels(config.data.path, manifest, "val")
        return _beton_batches(EvaluationBeton(path, labels, config, batches))
    images = ShardImages(config.data.path, manifest, "val")
    return _shard_batches(
        _Evaluated(images, evaluation_transform(config.evaluate, config.data.resolution)), batches, config
    )


class _Augmented(Dataset[Any]):
    def __init__(self, images: ShardImages, transform: Compose, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, int, int] | DataError:
        epoch, sample = item
        try:
            image = self.images.image(sample)
        except DataError as error:
            return error
        seed_sample(self.seed, epoch, sample)
        return self.transform(image), int(self.images.labels[sample]), sample


class _Evaluated(Dataset[Any]):
    def __init__(self, images: ShardImages, transform: Compose) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, sample: int) -> tuple[torch.Tensor, int, int] | DataError:
        try:
            return (
                self.transform(self.images.image(int(sample))),
                int(self.images.labels[sample]),
                int(sample),
            )
        except DataError as error:
            return error


def _collate(items: Sequence[tuple[torch.Tensor, int, int] | DataError]) -> Batch | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    images, labels, samples = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(samples))


def _as_is(item: Any) -> Any:
    return item


def _shard_batches(source: Dataset[Any], items: Iterable[Any], config: Config) -> Iterator[Batch]:
    workers = config.data.workers_per_rank
    return _raising(_loader(source, workers, batch_sampler=items, collate_fn=_collate))


def _beton_batches(source: Dataset[Any]) -> Iterator[Batch]:
    # FFCV has threads of its own: one process holds them all.
    return _raising(_loader(source, 1, batch_size=None, collate_fn=_as_is))


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)  # several processes share each core; more threads cost several times the CPU time


def _loader(source: Dataset[Any], workers: int, **options: Any) -> DataLoader[Any]:
    # The omp layer of numba, which FFCV compiles with, does not survive a fork; read when numba is first imported.
    os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
    if workers:
        options |= {"prefetch_factor": 4, "timeout": _SILENT_SECONDS, "worker_init_fn": _start_worker}
        options["multiprocessing_context"] = "fork"  # the datasets' arrays are shared, not pickled
    return DataLoader(source, num_workers=workers, pin_memory=torch.cuda.is_available(), **options)


def _raising(loader: DataLoader[Any]) -> Iterator[Batch]:
    try:
        for item in loader:
            if isinstance(item, Exception):
                raise item  # a worker hands its error over whole: raised there, it would come back as a traceback
            yield Batch(*item)
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        first_line = str(error).splitlines()[0]
        raise DataError(f"a data worker died or was silent for {_SILENT_SECONDS} s: {first_line}") from error
