"""Decoded, cropped and mirrored uint8 batches, by threads: the host's half of `augment.where: device`.

One process of each rank holds all its threads. Decoding and resizing release the GIL, and no image is copied on its way
into the batch, which lies in shared memory from the start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.config import Config
from pipeline.data.decode import crop_resize, image_size
from pipeline.data.keyed import crop_box, flipped
from pipeline.data.order import MicroBatch, SampleOrder
from pipeline.data.shards import DataError
from pipeline.data.views import Batch, Drawn, Views, assemble

_SLOTS = 4  # images a task: enough work to hide what a task costs, small enough for threads to end together
_AHEAD_IMAGES = 64  # at least so many are under way, of remote shards


class TrainingCrops(IterableDataset[Any]):
    """Micro-batches of one rank, in order, for steps first_step .. last_step - 1: uint8 images, see Batch.

    Yields a DataError in the place of a batch that cannot be made, and ends.
    """

    def __init__(
        self, config: Config, views: Views, order: SampleOrder, rank: int, ranks: int, first_step: int, last_step: int
    ) -> None:
        self.config, self.views, self.order = config, views, order
        self.rank, self.ranks, self.first_step, self.last_step = rank, ranks, first_step, last_step

    def __iter__(self) -> Iterator[Batch | DataError]:
        micro_batch = self.config.train.micro_batch
        threads = max(1, self.config.data.workers_per_rank)
        images_ahead = max(2 * threads * _SLOTS, _AHEAD_IMAGES if self.views.reader.remote else 0)
        ahead = 1 + -(-images_ahead // micro_batch)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        fetcher = ThreadPoolExecutor(ahead, thread_name_prefix="fetch") if self.views.reader.remote else None
        pending: deque[_Pending] = deque()
        try:
            steps = self.order.micro_batches(self.first_step, self.last_step, self.rank, self.ranks, micro_batch)
            for number, micro in enumerate(steps):
                if number % 64 == 0:
                    self.views.reader.ahead(self.order.shards_ahead(micro.step, self.rank, self.ranks))
                pending.append(_Pending(self, micro, pool, fetcher))
                if len(pending) == ahead:
                    yield pending.popleft().batch()
            while pending:
                yield pending.popleft().batch()
        except DataError as error:
            yield error
        finally:
            for executor in (pool, fetcher):
                if executor is not None:
                    executor.shutdown(wait=False, cancel_futures=True)


class _Pending:
    """A micro-batch whose images are being made."""

    def __init__(
        self, source: TrainingCrops, micro: MicroBatch, pool: ThreadPoolExecutor, fetcher: ThreadPoolExecutor | None
    ) -> None:
        self.views, self.micro, self.keys = source.views, micro, source.views.keys(micro)
        augment = source.config.augment
        self.area_min, self.flip, self.interpolation = (
            augment.crop_area_min,
            augment.horizontal_flip,
            augment.interpolation,
        )
        self.side = source.config.data.resolution_at(micro.epoch)
        self.images = uint8_tensor(len(micro.samples), self.side, self.side, 3)
        self.rows = self.images.numpy()
        self.fetched: Future[list[bytes | DataError]] | None = (
            fetcher.submit(self.views.reader.encoded_many, micro.samples) if fetcher else None
        )
        starts = range(0, len(micro.samples), _SLOTS)
        self.tasks = [pool.submit(self._make, start, min(start + _SLOTS, len(micro.samples))) for start in starts]

    def batch(self) -> Batch:
        """Wait for the images. Raises DataError."""
        drawn = [item for task in self.tasks for item in task.result()]
        return assemble(self.images.permute(0, 3, 1, 2), drawn, self.micro.views)

    def _make(self, start: int, stop: int) -> list[Drawn]:
        return [self._draw(slot) for slot in range(start, stop)]

    def _draw(self, slot: int) -> Drawn:
        sample, out = int(self.micro.samples[slot]), self.rows[slot]
        data = self.fetched.result()[slot] if self.fetched else self.views.reader.encoded_many([sample])[0]

        def render(data: bytes, key: int) -> None:
            box = crop_box(*image_size(data), self.area_min, key)
            crop_resize(data, box, self.side, out, flipped(key, self.flip), self.interpolation)

        return self.views.draw(sample, self.micro.epoch, self.keys[slot], data, render)


def uint8_tensor(*shape: int) -> torch.Tensor:
    """Uninitialised; in shared memory inside a data worker, so that handing it over copies nothing."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]
