"""The order of samples: a permutation each epoch, the same for any number of ranks, from any step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import SampleOrder


@given(st.integers(64, 400), st.integers(0, 2**31 - 1), st.integers(0, 100))
def test_permutation_each_epoch(samples: int, seed: int, epoch: int) -> None:
    order = SampleOrder(samples, 16, seed)
    assert sorted(order.permutation(epoch)) == list(range(samples))
    assert (order.permutation(epoch) != order.permutation(epoch + 1)).any()


@given(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2]), st.integers(0, 11), st.integers(64, 90))
def test_ranks_and_resume_see_the_same_steps(ranks: int, micro: int, first: int, samples: int) -> None:
    """The union over ranks of step s is positions s*B .. (s+1)*B of the epoch, wherever reading begins."""
    order, last = SampleOrder(samples, 32, 3), 13
    by_rank = [list(order.micro_batches(first, last, rank, ranks, micro)) for rank in range(ranks)]
    per_step = 32 // ranks // micro
    for i, step in enumerate(range(first, last)):
        epoch, in_epoch = divmod(step, order.steps_per_epoch)
        parts = [part for batches in by_rank for part in batches[i * per_step : (i + 1) * per_step]]
        assert {part_epoch for part_epoch, _ in parts} == {epoch}
        found = np.concatenate([ids for _, ids in parts])
        assert (found == order.permutation(epoch)[in_epoch * 32 : (in_epoch + 1) * 32]).all()
    assert all(len(batches) == (last - first) * per_step for batches in by_rank)


def test_seeds_and_epochs_are_unrelated() -> None:
    a, b = SampleOrder(1000, 10, 3).permutation(1), SampleOrder(1000, 10, 4).permutation(0)
    assert (a == b).mean() < 0.02


def test_too_few_samples() -> None:
    with pytest.raises(ValueError, match="10 training samples do not fill one global batch of 16"):
        SampleOrder(10, 16, 0)
