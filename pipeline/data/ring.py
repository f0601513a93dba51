"""Buffers for decoded batches that a rank and its data workers share, used in turn.

A tensor that a DataLoader hands over lies in shared memory made for it alone: each of its pages costs a fault in either
process, together a tenth of the time that decoding takes; it counts against the container's /dev/shm (64 MB in many);
and a worker that is killed while it makes one leaves it there for good. Here the memory is mapped once, before workers
are forked, and belongs to no file. The rank copies each batch out (into pinned memory where it has a GPU, in the
DataLoader's own thread) and gives the buffer back: what it holds stays valid for as long as it likes.
"""

from __future__ import annotations

import itertools
import math
import mmap
import weakref
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from torch.utils.data import get_worker_info

from pipeline.data.views import BadSample, Batch, assemble

PREFETCHED_BATCHES = 2  # made and not yet taken, of each data worker

_numbers = itertools.count()
_rings: weakref.WeakValueDictionary[int, Ring] = weakref.WeakValueDictionary()


class RingClosed(Exception):
    """The rank takes no more batches."""


class Ring:
    """Buffers for batches of at most `bytes_per_batch`; made by the rank, filled by the data workers that it forks.

    One for each batch that can be under way: the `ahead` that a worker makes at a time and those it has prefetched, of
    all `workers`; and two that the rank copies out. With fewer, the one whose turn it is could wait for the others.
    """

    def __init__(self, bytes_per_batch: int, ahead: int = 1, workers: int = 1) -> None:
        self.number, self.workers = next(_numbers), workers
        slots = workers * (ahead - 1 + PREFETCHED_BATCHES) + 2
        memory = mmap.mmap(-1, slots * bytes_per_batch)  # taken page by page, as it is first written
        self._memory = np.frombuffer(memory, np.uint8).reshape(slots, bytes_per_batch)
        self._free = get_context("fork").SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)
        _rings[self.number] = self

    def take(self) -> int:
        """A free slot, once there is one. Raises RingClosed."""
        slot = self._free.get()
        if slot is None:
            raise RingClosed
        return slot

    def array(self, slot: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """What a slot holds, as an array."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return self._memory[slot, :size].view(dtype).reshape(shape)

    def give_back(self, slot: int) -> None:
        """The slot may be filled again."""
        self._free.put(slot)

    def close(self) -> None:
        """Tell workers that wait for a slot that none will come."""
        with suppress(OSError):  # at the end of the process the queue may be gone
            for _ in range(self.workers):
                self._free.put(None)


class BatchPlace:
    """Where the images of a batch are written: a slot of the ring, or the rank's own memory where it reads itself.

    images: uint8 (B, side, side, 3), or float32 (B, 3, side, side) where the host normalises.

    Raises RingClosed.
    """

    def __init__(self, ring: Ring | None, images: int, side: int, dtype: str = "uint8") -> None:
        shape = (images, side, side, 3) if dtype == "uint8" else (images, 3, side, side)
        self.ring = ring if get_worker_info() is not None else None
        if self.ring is not None:
            self.slot = self.ring.take()
            self.images = self.ring.array(self.slot, shape, dtype)
        else:
            self.images = np.empty(shape, dtype)

    def batch(self, numbers: np.ndarray, bad: tuple[BadSample, ...] = ()) -> Batch | RingBatch:
        """The batch, now that the images are written. `numbers`: labels, samples, views, int64 (3, B)."""
        if self.ring is not None:
            return RingBatch(self.ring.number, self.slot, self.images.shape, self.images.dtype.name, numbers, bad)
        return _assembled(torch.from_numpy(self.images), numbers, bad)


@dataclass(frozen=True)
class RingBatch:
    """A Batch whose images (see BatchPlace) lie in a slot: what goes through the workers' queue.

    numbers: int64 (3, B), the batch's labels, samples and views.
    """

    ring: int
    slot: int
    shape: tuple[int, ...]
    dtype: str
    numbers: np.ndarray
    bad: tuple[BadSample, ...]

    def batch(self, pinned: bool = False) -> Batch:
        """Copy the batch out, in the rank, and give the slot back."""
        ring = _rings[self.ring]
        images = torch.empty(self.shape, dtype=getattr(torch, self.dtype), pin_memory=pinned)
        np.copyto(images.numpy(), ring.array(self.slot, self.shape, self.dtype))
        ring.give_back(self.slot)
        return _assembled(images, self.numbers, self.bad)

    def pin_memory(self) -> Batch:
        """Called by the DataLoader's thread where there is a GPU."""
        return self.batch(pinned=True)


def _assembled(images: torch.Tensor, numbers: np.ndarray, bad: tuple[BadSample, ...]) -> Batch:
    return assemble(images.permute(0, 3, 1, 2) if images.dtype == torch.uint8 else images, numbers, bad)
