"""FFCV reader: the order of `order.py` through FFCV's own Loader, the same batches of sample ids as from shards.

The Loader runs inside one data worker process of each rank, with `workers_per_rank` threads. That keeps FFCV's threads
and page cache out of the training process, lets the rest of the augmentation overlap with the GPU, and turns a hang
into an error, since the DataLoader around it has a timeout. FFCV decodes, crops and mirrors; with augment.where=host,
RandAugment, normalisation and erasing follow in the worker, one image at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset

from pipeline.config.load import Config
from pipeline.data.augment import seed_view, training_transform
from pipeline.data.keyed import view_keys
from pipeline.data.order import MicroBatch, SampleOrder
from pipeline.data.ring import BatchPlace, Ring, RingBatch, RingClosed
from pipeline.data.shards import DataError
from pipeline.data.views import BadSample, Batch


class TrainingBeton(IterableDataset[Any]):
    """Micro-batches of one rank for steps first_step .. last_step - 1; see Batch for what they hold.

    Yields a DataError in the place of a batch that cannot be made, and ends.
    """

    def __init__(
        self, path: Path, config: Config, order: SampleOrder, rank: int, ranks: int, first_step: int, last_step: int
    ) -> None:
        self.path, self.config, self.order = path, config, order
        self.rank, self.ranks, self.first_step, self.last_step = rank, ranks, first_step, last_step
        self.dtype = "uint8" if config.augment.where == "device" else "float32"
        bytes_per_image = 3 * config.data.largest_resolution**2 * np.dtype(self.dtype).itemsize
        self.ring = Ring(config.train.micro_batch * bytes_per_image)

    def __iter__(self) -> Iterator[Batch | RingBatch | DataError]:
        from pipeline.data.ffcv_decoders import training_decoder
        from pipeline.data.ffcv_loader import OrderedLoader

        config, augment, data = self.config, self.config.augment, self.config.data
        on_device = augment.where == "device"
        micros = self.order.micro_batches(
            self.first_step, self.last_step, self.rank, self.ranks, config.train.micro_batch
        )
        loader, compiled_for = None, 0
        try:
            for epoch, of_epoch in groupby(micros, key=lambda micro: micro.epoch):
                side = data.resolution_at(epoch)
                if side != compiled_for:
                    # With timm on the host, timm mirrors.
                    flip = augment.horizontal_flip if on_device else 0.0
                    decoder = training_decoder(side, augment.crop_area_min, config.seed, flip, self.order.samples)
                    loader = OrderedLoader(
                        self.path, decoder, config.train.micro_batch, data.workers_per_rank, data.ffcv_cache
                    )
                    compiled_for = side
                    rest = None if on_device else training_transform(augment, side)[1]
                assert loader is not None
                batches = list(of_epoch)
                decoded = loader.batches(np.concatenate([micro.views for micro in batches]))
                for micro, (pixels, good) in zip(batches, decoded, strict=True):
                    yield self._batch(micro, pixels, good, loader.labels, rest)
        except DataError as error:
            yield error
        except RingClosed:
            return

    def _batch(
        self, micro: MicroBatch, pixels: np.ndarray, good: np.ndarray, labels: np.ndarray, rest: Any
    ) -> Batch | RingBatch:
        slots, bad = np.arange(len(good)), []
        for slot in np.flatnonzero(~good):
            sample = int(micro.samples[slot])
            error = f"{self.path}: sample {sample} does not decode; the file is damaged, rebuild it"
            # FFCV decodes whole batches: a stand-in is the next image of this one that did decode.
            others = np.flatnonzero(np.roll(good, -slot))
            if self.config.data.on_bad_sample == "raise" or not len(others):
                raise DataError(error)
            slots[slot] = (slot + others[0]) % len(good)
            bad.append(BadSample(sample, micro.epoch, error, int(micro.samples[slots[slot]])))
        samples = micro.samples[slots]
        numbers = np.array([labels[samples], samples, micro.views], np.int64)
        place = BatchPlace(self.ring, len(good), pixels.shape[1], self.dtype)
        if rest is None:
            np.copyto(place.images, pixels if good.all() else pixels[slots])
            return place.batch(numbers, tuple(bad))
        for out, slot, key in zip(place.images, slots, view_keys(self.config.seed, micro.views).tolist(), strict=True):
            seed_view(key)
            out[:] = rest(Image.fromarray(pixels[slot])).numpy()
        return place.batch(numbers, tuple(bad))


class EvaluationBeton(IterableDataset[Any]):
    """Given batches of sample ids, in that order, uint8 (see Batch)."""

    def __init__(self, path: Path, config: Config, batches: Sequence[np.ndarray]) -> None:
        self.path, self.config, self.batches = path, config, batches
        self.ring = Ring(config.evaluate.micro_batch * 3 * config.data.resolution**2)

    def __iter__(self) -> Iterator[Batch | RingBatch | DataError]:
        from pipeline.data.ffcv_decoders import evaluation_decoder
        from pipeline.data.ffcv_loader import OrderedLoader

        data, evaluate = self.config.data, self.config.evaluate
        try:
            ids = np.concatenate([*self.batches, np.zeros(0, np.int64)])
            decoder = evaluation_decoder(data.resolution, evaluate.resize, evaluate.crop_ratio, _samples(self.path))
            loader = OrderedLoader(self.path, decoder, evaluate.micro_batch, data.workers_per_rank, data.ffcv_cache)
            for samples, (pixels, good) in zip(self.batches, loader.batches(ids), strict=True):
                if not good.all():
                    raise DataError(f"{self.path}: sample {samples[~good][0]} does not decode; rebuild the file")
                place = BatchPlace(self.ring, len(samples), data.resolution)
                np.copyto(place.images, pixels)
                yield place.batch(np.array([loader.labels[samples], samples, samples], np.int64))
        except DataError as error:
            yield error
        except RingClosed:
            return


def _samples(path: Path) -> int:
    from ffcv.types import HeaderType

    return int(np.fromfile(path, dtype=HeaderType, count=1)[0]["num_samples"])
