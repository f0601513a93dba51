"""Buffers for decoded batches that a rank and its data worker share, used in turn.

A batch that a DataLoader hands over lies in shared memory made for it alone: each of its pages costs a fault in either
process, together a tenth of the time that decoding takes, and it counts against the container's /dev/shm (64 MB in
many). Here the memory is mapped once, before the worker is forked, and belongs to no file, so that nothing is left
behind by a kill. The rank copies each batch out (into pinned memory where it has a GPU, in the DataLoader's own thread)
and gives the buffer back: what it holds stays valid for as long as it likes.
"""

from __future__ import annotations

import itertools
import mmap
import weakref
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch

from pipeline.data.views import BadSample, Batch, assemble

_numbers = itertools.count()
_rings: weakref.WeakValueDictionary[int, Ring] = weakref.WeakValueDictionary()


class RingClosed(Exception):
    """The rank takes no more batches."""


class Ring:
    """`slots` buffers of `slot_bytes`; made by the rank, filled by the one data worker that it forks."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.number = next(_numbers)
        self._memory = np.frombuffer(mmap.mmap(-1, slots * slot_bytes), np.uint8).reshape(slots, slot_bytes)
        self._free = get_context("fork").SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)
        _rings[self.number] = self

    def take(self, *shape: int) -> tuple[int, np.ndarray]:
        """(slot, its buffer as uint8 of `shape`); waits for a free one. Raises RingClosed."""
        slot = self._free.get()
        if slot is None:
            raise RingClosed
        return slot, self.buffer(slot, shape)

    def buffer(self, slot: int, shape: tuple[int, ...]) -> np.ndarray:
        """A slot's bytes as uint8 of `shape`."""
        return self._memory[slot, : int(np.prod(shape))].reshape(shape)

    def give_back(self, slot: int) -> None:
        """The slot may be filled again."""
        self._free.put(slot)

    def close(self) -> None:
        """Tell a worker that waits for a slot that none will come."""
        with suppress(OSError):  # at the end of the process the queue may be gone
            self._free.put(None)


@dataclass(frozen=True)
class RingBatch:
    """A Batch whose images (B, H, W, 3) lie in a slot: what goes through the worker's queue.

    numbers: int64 (3, B), the batch's labels, samples and views.
    """

    ring: int
    slot: int
    shape: tuple[int, ...]
    numbers: np.ndarray
    bad: tuple[BadSample, ...]

    def batch(self, pinned: bool = False) -> Batch:
        """Copy the batch out, in the rank, and give the slot back."""
        ring = _rings[self.ring]
        images = torch.empty(self.shape, dtype=torch.uint8, pin_memory=pinned)
        np.copyto(images.numpy(), ring.buffer(self.slot, self.shape))
        ring.give_back(self.slot)
        return assemble(images.permute(0, 3, 1, 2), self.numbers, self.bad)

    def pin_memory(self) -> Batch:
        """Called by the DataLoader's thread where there is a GPU."""
        return self.batch(pinned=True)
