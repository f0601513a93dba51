"""FFCV's Loader (1.0.2) with an order of ours, and its hangs and leaks cured. What is cured:

- it waits for ever once its thread has died: here a dead thread is an error within two seconds;
- it takes no notice of a JPEG that does not decode and hands out what the buffer held: here each slot is checked;
- an epoch left early keeps its thread and buffers: here they are given back;
- its tables of Python objects take 0.6 GB a million samples in every rank: here they are arrays, 25 MB.

This file needs FFCV to be imported, so it is imported only where a `.beton` is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any, Literal
from unittest.mock import patch

import ffcv.loader.epoch_iterator as epoch_iterator
import ffcv.loader.loader as ffcv_loader
import numpy as np
from ffcv.memory_managers import OSCacheManager, ProcessCacheManager
from ffcv.memory_managers.os_cache import OSCacheContext

from pipeline.data.ffcv_decoders import BoxDecoder
from pipeline.data.shards import DataError


class OrderedLoader:
    """Decoded batches of one `.beton`, in whatever order is asked for.

    `batches(views)` takes view numbers (keyed.py): FFCV hands a decoder nothing but the indices it was asked for, so
    those carry the epoch; the sample is view % samples.
    """

    def __init__(
        self, path: Path, decoder: BoxDecoder, batch: int, threads: int, cache: Literal["auto", "os", "process"]
    ) -> None:
        mapped = cache == "os" or (cache == "auto" and path.stat().st_size < _ram_bytes())
        # Where the rank has a GPU, FFCV would open CUDA streams, which a forked worker cannot; the trainer copies.
        epoch_iterator.IS_CUDA = False
        self.path = path
        managers = patch.multiple(ffcv_loader, OSCacheManager=_Mapped, ProcessCacheManager=_Paged)
        with managers:
            self._loader = ffcv_loader.Loader(
                str(path),
                batch_size=batch,
                # numba refuses more threads than this process may use cores.
                num_workers=min(max(1, threads), len(os.sched_getaffinity(0))),
                os_cache=mapped,
                order=ffcv_loader.OrderOption.SEQUENTIAL,
                # Labels and ids follow from the order: nothing but pixels is read.
                pipelines={"image": [decoder], "label": None, "sample": None},
                drop_last=False,
                seed=0,
            )
        self._loader.traversal_order = _GivenOrder()
        self.labels = self._loader.reader.metadata["f1"]  # (samples,) int64

    def batches(self, views: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(pixels uint8 (B, H, W, 3), decoded bool (B,)) for view numbers (N,), B of them at a time.

        Each batch is valid until the next one is asked for. Raises DataError when FFCV's thread dies.
        """
        if not len(views):
            return
        loader = self._loader
        loader.traversal_order.indices = loader.first_traversal_order = views.astype(np.uint64)
        epoch = iter(loader)
        try:
            for _ in range(math.ceil(len(views) / loader.batch_size)):
                (pixels,) = self._next(epoch)
                # The decoder has a row more than the image: its first byte says whether the image decoded.
                yield pixels[:, :-1], pixels[:, -1, 0, 0] == 0
        finally:
            epoch.close()
            epoch.join()

    def _next(self, epoch: Any) -> Any:
        while True:
            alive = epoch.is_alive()  # read before the queue: what a thread left behind is still taken
            try:
                return epoch.output_queue.get(timeout=1.0)[1]
            except Empty:
                if not alive:
                    raise DataError(f"{self.path}: FFCV's reading thread died; its error is above") from None


class _GivenOrder:
    """Stands in for FFCV's traversal orders, which know only their own shuffles."""

    def __init__(self) -> None:
        self.indices = np.zeros(0, np.uint64)

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.indices


def _sorted_allocations(manager: Any, reader: Any) -> None:
    """What FFCV's base class sets up, less the dictionaries that only its own orders read."""
    manager.reader = reader
    order = np.argsort(reader.alloc_table["ptr"])
    manager.ptrs, manager.sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]


class _Mapped(OSCacheManager):
    def __init__(self, reader: Any) -> None:
        _sorted_allocations(self, reader)
        self.context = OSCacheContext(self)


class _Paged(ProcessCacheManager):
    def __init__(self, reader: Any) -> None:
        _sorted_allocations(self, reader)
        self.sample_to_pages = _PagesOfViews(reader)


class _PagesOfViews:
    """view number -> pages, as FFCV's schedule asks for them; an image lies within one page."""

    def __init__(self, reader: Any) -> None:
        shift = np.uint64(int(reader.page_size).bit_length() - 1)
        self.pages = (reader.metadata["f0"]["data_ptr"] >> shift).astype(np.uint32)

    def __getitem__(self, view: int) -> tuple[int]:
        return (int(self.pages[int(view) % len(self.pages)]),)


def _ram_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
