"""Decoded, cropped and mirrored uint8 batches, by threads: the host's half of `augment.where: device`.

One process of each rank holds all its threads. Decoding and resizing release the GIL, and each image is made in its
place in the batch, which lies in memory that the rank shares (ring.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch.utils.data import IterableDataset

from pipeline.config.load import Config
from pipeline.data.decode import crop_resize, image_size
from pipeline.data.keyed import crop_box, flipped
from pipeline.data.mixture import TrainingOrder
from pipeline.data.order import MicroBatch
from pipeline.data.ring import BatchPlace, Ring, RingBatch, RingClosed
from pipeline.data.shards import DataError
from pipeline.data.views import Batch, Drawn, Views, numbers_of

_TASK_IMAGES = 4  # images a task: enough work to hide what a task costs, small enough for threads to end together
_REMOTE_IMAGES = 64  # at least so many are under way, of remote shards


class TrainingCrops(IterableDataset[Any]):
    """Micro-batches of one rank, in order, for steps first_step .. last_step - 1: uint8 images, see Batch.

    Yields a DataError in the place of a batch that cannot be made, and ends.
    """

    def __init__(
        self,
        config: Config,
        views: Views,
        order: TrainingOrder,
        rank: int,
        ranks: int,
        first_step: int,
        last_step: int,
    ) -> None:
        self.config, self.views, self.order = config, views, order
        self.rank, self.ranks, self.first_step, self.last_step = rank, ranks, first_step, last_step
        self.reader = views.reader
        self.threads = max(1, config.data.workers_per_rank)
        images = max(2 * self.threads * _TASK_IMAGES, _REMOTE_IMAGES if views.reader.remote else 0)
        self.ahead = 1 + -(-images // config.train.micro_batch)  # batches under way
        batch_bytes = config.train.micro_batch * 3 * config.data.largest_resolution**2
        self.ring = Ring(batch_bytes, self.ahead) if config.data.workers_per_rank else None

    def __iter__(self) -> Iterator[Batch | RingBatch | DataError]:
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        threads = self.views.reader.fetch_threads
        fetcher = None if threads is None else ThreadPoolExecutor(threads or self.ahead, thread_name_prefix="fetch")
        pending: deque[_Pending] = deque()
        steps = self.order.micro_batches(
            self.first_step, self.last_step, self.rank, self.ranks, self.config.train.micro_batch
        )
        try:
            for number, micro in enumerate(steps):
                if number % 64 == 0:
                    self.views.reader.ahead(self.order.shards_ahead(micro.step, self.rank, self.ranks))
                pending.append(_Pending(self, micro, pool, fetcher))
                if len(pending) == self.ahead:
                    yield pending.popleft().batch()
            while pending:
                yield pending.popleft().batch()
        except DataError as error:
            yield error
        except RingClosed:
            return
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
        self.area_min, self.flip, self.filter = augment.crop_area_min, augment.horizontal_flip, augment.interpolation
        self.side = source.config.data.resolution_at(micro.epoch)
        self.place = BatchPlace(source.ring, len(micro.samples), self.side)
        self.fetched: Future[Sequence[bytes | DataError]] | None = (
            fetcher.submit(self.views.reader.encoded_batch, micro) if fetcher else None
        )
        starts = range(0, len(micro.samples), _TASK_IMAGES)
        self.tasks = [pool.submit(self._make, start, min(start + _TASK_IMAGES, len(micro.samples))) for start in starts]

    def batch(self) -> Batch | RingBatch:
        """Wait for the images. Raises DataError."""
        drawn = [item for task in self.tasks for item in task.result()]
        return self.place.batch(*numbers_of(drawn, self.micro.views))

    def _make(self, start: int, stop: int) -> list[Drawn]:
        reader, samples = self.views.reader, self.micro.samples[start:stop]
        files = self.fetched.result()[start:stop] if self.fetched else reader.encoded_many(samples)
        return [self._draw(slot, data) for slot, data in zip(range(start, stop), files, strict=True)]

    def _draw(self, slot: int, data: bytes | DataError) -> Drawn:
        sample, out = int(self.micro.samples[slot]), self.place.images[slot]

        def render(data: bytes, key: int) -> None:
            box = crop_box(*image_size(data), self.area_min, key)
            crop_resize(data, box, self.side, out, flipped(key, self.flip), self.filter)

        others = self.fetched.result() if self.fetched else None
        return self.views.draw(sample, self.micro, self.keys[slot], data, render, others)
