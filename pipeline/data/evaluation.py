"""Evaluation images by threads, as uint8: the resize and crop of timm's transform; the device normalises.

As floats they would be four times as large: 113 MB for a batch of 64 images at 384 px.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset

from pipeline.config.load import Config
from pipeline.data.augment import evaluation_transform
from pipeline.data.decode import DecodeError, decode_rgb
from pipeline.data.ring import BatchPlace, Ring, RingBatch, RingClosed
from pipeline.data.shards import DataError, EncodedReader
from pipeline.data.views import Batch

_AHEAD = 2  # batches under way


class EvaluationImages(IterableDataset[Any]):
    """Given batches of sample ids, in that order, uint8. Yields a DataError in place of a bad one, and ends."""

    def __init__(self, config: Config, reader: EncodedReader, batches: Sequence[np.ndarray]) -> None:
        self.reader, self.batches = reader, batches
        self.threads, self.side = max(1, config.data.workers_per_rank), config.data.resolution
        self.transform = evaluation_transform(config.evaluate, self.side)
        batch_bytes = config.evaluate.micro_batch * 3 * self.side**2
        self.ring = Ring(batch_bytes, _AHEAD) if config.data.workers_per_rank else None

    def __iter__(self) -> Iterator[Batch | RingBatch | DataError]:
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        fetcher = ThreadPoolExecutor(self.reader.fetch_threads or _AHEAD, thread_name_prefix="fetch")
        pending: deque[tuple[np.ndarray, BatchPlace, Future[list[int]]]] = deque()
        self.reader.ahead(range(self.reader.shard_count))
        try:
            for samples in self.batches:
                place = BatchPlace(self.ring, len(samples), self.side)
                pending.append((samples, place, fetcher.submit(self._make, pool, samples, place.images)))
                if len(pending) == _AHEAD:
                    yield self._finish(*pending.popleft())
            while pending:
                yield self._finish(*pending.popleft())
        except DataError as error:
            yield error
        except RingClosed:
            return
        finally:
            for executor in (fetcher, pool):
                executor.shutdown(wait=False, cancel_futures=True)

    def _make(self, pool: ThreadPoolExecutor, samples: np.ndarray, pixels: np.ndarray) -> list[int]:
        """Write the images into `pixels` (B, H, W, 3); returns their labels."""
        data = self.reader.encoded_many(samples)
        return list(pool.map(self._draw, samples.tolist(), data, pixels))

    def _draw(self, sample: int, data: bytes | DataError, out: np.ndarray) -> int:
        if isinstance(data, DataError):
            raise data
        try:
            out[:] = np.asarray(self.transform(Image.fromarray(decode_rgb(data))))
        except DecodeError as error:
            raise self.reader.damaged(sample, error, data) from None
        return self.reader.label_of(sample, data)

    def _finish(self, samples: np.ndarray, place: BatchPlace, made: Future[list[int]]) -> Batch | RingBatch:
        return place.batch(np.array([made.result(), samples, samples], np.int64))
