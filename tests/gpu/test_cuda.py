"""What only a GPU shows of the way from the data workers to the device."""

import numpy as np
import pytest
import torch

from pipeline.data.ring import PREFETCHED_BATCHES, Ring, RingBatch
from tests.support.datasets import Datasets
from tests.support.loading import ON_DEVICE, read

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_a_slot_may_be_written_again_while_its_batch_is_on_the_way() -> None:
    """The batch is copied out into pinned memory: the slot is free at once, and the device gets the first bytes."""
    shape = (8, 64, 64, 3)
    ring = Ring(int(np.prod(shape)), workers=1)
    for value in range(4 * PREFETCHED_BATCHES):
        slot = ring.take()
        ring.array(slot, shape, "uint8")[:] = value
        batch = RingBatch(ring.number, slot, shape, "uint8", np.zeros((3, 8), np.int64), ()).pin_memory()
        assert batch.images.is_pinned()
        there = batch.images.to("cuda", non_blocking=True)
        ring.array(slot, shape, "uint8")[:] = 255
        assert torch.equal(there.cpu(), torch.full_like(batch.images, value))
    ring.close()


def test_workers_give_pinned_batches_that_are_those_of_the_rank(datasets: Datasets) -> None:
    ours = read(datasets, 0, 3, ON_DEVICE)
    theirs = read(datasets, 0, 3, ON_DEVICE, "data.workers_per_rank=2")
    assert len(ours) == len(theirs) > 0
    for here, there in zip(ours, theirs, strict=True):
        assert there.images.is_pinned()
        assert torch.equal(here.images, there.images)
        assert torch.equal(here.samples, there.samples)
