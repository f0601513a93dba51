"""FFCV reader: the order of `order.py` through FFCV's own Loader, the same batches of sample ids as `shards.py`.

The Loader runs inside one data worker process of each rank, with `workers_per_rank` threads. That keeps FFCV's threads
and page cache out of the training process, lets the rest of the augmentation overlap with the GPU, and turns a hang
into an error, since the DataLoader around it has a timeout. FFCV decodes and crops; flip, RandAugment, normalisation
and erasing follow in the worker, one image at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from torchvision.transforms import Compose

from data_prep.manifest import Manifest
from pipeline.config import Config
from pipeline.data.augment import augment_decoded, normalise_decoded, seed_sample
from pipeline.data.order import SampleOrder
from pipeline.data.shards import DataError, check_file

Arrays = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def beton_path(directory: Path, manifest: Manifest, split: str) -> Path:
    """The split's `.beton`. Raises DataError where there is none, more than one, or one of another size."""
    betons = manifest.split(split).betons
    if not betons:
        raise DataError(
            f"{directory} has no .beton of split {split!r}: set data.format=webdataset, or build it with "
            f"`python -m data_prep shard ... --format both`"
        )
    if len(betons) > 1:
        raise DataError(f"{directory} has {len(betons)} betons of split {split!r}; one is supported")
    check_file(directory / betons[0].file, betons[0].bytes)
    try:
        import ffcv  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"data.format is ffcv, but FFCV is not there ({error}): `make setup` says what it needs; "
            f"or set data.format=webdataset"
        ) from None
    return directory / betons[0].file


class TrainingBeton(IterableDataset[Any]):
    """Augmented micro-batches (images float32 (B, 3, H, W), labels (B,), samples (B,)) of one rank."""

    def __init__(
        self,
        path: Path,
        labels: np.ndarray,
        config: Config,
        order: SampleOrder,
        rank: int,
        ranks: int,
        first_step: int,
        last_step: int,
        rest: Compose,
    ) -> None:
        self.path, self.labels, self.config, self.order = path, labels, config, order
        self.rank, self.ranks, self.first_step, self.last_step = rank, ranks, first_step, last_step
        self.rest = rest

    def __iter__(self) -> Iterator[Arrays | DataError]:
        from pipeline.data.ffcv_decoders import KeyedCropDecoder

        config, order = self.config, self.order
        decoder = KeyedCropDecoder(
            config.data.resolution, config.augment.crop_area_min, config.seed, samples=len(self.labels)
        )
        loader = _ffcv_loader(self.path, decoder, config.train.micro_batch, config.data.workers_per_rank)
        step = self.first_step
        try:
            while step < self.last_step:
                epoch, step_in_epoch = divmod(step, order.steps_per_epoch)
                ids = order.rank_steps(epoch, step_in_epoch, self.rank, self.ranks)[: self.last_step - step]
                batches = ids.reshape(-1, config.train.micro_batch)
                virtual = ids.reshape(-1).astype(np.uint64) + np.uint64(epoch * len(self.labels))
                for samples, pixels in zip(batches, _epoch(loader, virtual), strict=True):
                    images = []
                    for sample, crop in zip(samples, pixels, strict=True):
                        seed_sample(config.seed, epoch, int(sample))
                        images.append(augment_decoded(self.rest, crop))
                    yield (
                        torch.stack(images),
                        torch.from_numpy(self.labels[samples]).long(),
                        torch.from_numpy(samples),
                    )
                step += len(ids)
        except DataError as error:
            yield error


class EvaluationBeton(IterableDataset[Any]):
    """Given batches of sample ids, in that order, normalised without augmentation."""

    def __init__(self, path: Path, labels: np.ndarray, config: Config, batches: Sequence[np.ndarray]) -> None:
        self.path, self.labels, self.config, self.batches = path, labels, config, batches

    def __iter__(self) -> Iterator[Arrays | DataError]:
        from pipeline.data.ffcv_decoders import CentreCropDecoder, WarpDecoder

        side, evaluate = self.config.data.resolution, self.config.evaluate
        decoder = (
            WarpDecoder(side) if evaluate.resize == "warp" else CentreCropDecoder((side, side), evaluate.crop_ratio)
        )
        loader = _ffcv_loader(self.path, decoder, evaluate.micro_batch, self.config.data.workers_per_rank)
        try:
            order = np.concatenate([*self.batches, np.zeros(0, np.int64)])
            for samples, pixels in zip(self.batches, _epoch(loader, order.astype(np.uint64)), strict=True):
                yield (
                    normalise_decoded(pixels),
                    torch.from_numpy(self.labels[samples]).long(),
                    torch.from_numpy(samples),
                )
        except DataError as error:
            yield error


class _GivenOrder:
    """Stands in for FFCV's traversal orders, which know only their own shuffles."""

    def __init__(self) -> None:
        self.indices = np.zeros(0, np.uint64)

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.indices


def _ffcv_loader(path: Path, decoder: Any, batch: int, threads: int) -> Any:
    import ffcv.loader.epoch_iterator as epoch_iterator
    from ffcv.loader import Loader, OrderOption

    # Where the rank has a GPU, FFCV would open CUDA streams, which a forked worker cannot; the trainer copies.
    epoch_iterator.IS_CUDA = False
    loader = Loader(
        str(path),
        batch_size=batch,
        # numba refuses more threads than this process may use cores.
        num_workers=min(max(1, threads), len(os.sched_getaffinity(0))),
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        # Labels and ids follow from the order: nothing but pixels is read.
        pipelines={"image": [decoder], "label": None, "sample": None},
        drop_last=False,
        seed=0,
    )
    loader.traversal_order = _GivenOrder()
    return loader


def _epoch(loader: Any, indices: np.ndarray) -> Iterator[np.ndarray]:
    """Decoded batches, uint8 (B, H, W, 3), for `indices`; each is valid until the next one is asked for.

    FFCV waits for ever when its thread has died, and leaks thread and buffers when an epoch is left early: both are
    mended here. Raises DataError when the thread dies.
    """
    if not len(indices):
        return
    loader.traversal_order.indices = loader.first_traversal_order = indices
    batches = math.ceil(len(indices) / loader.batch_size)
    epoch = iter(loader)
    try:
        for _ in range(batches):
            while True:
                alive = epoch.is_alive()  # read before the queue: what a thread left behind is still taken
                try:
                    item = epoch.output_queue.get(timeout=1.0)
                    break
                except Empty:
                    if not alive:
                        raise DataError(f"{loader.fname}: FFCV's reading thread died; its error is above") from None
            _, (pixels,) = item
            yield pixels
    finally:
        epoch.close()
        epoch.join()
