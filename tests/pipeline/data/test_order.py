"""The order of samples: a permutation each epoch, the same for any number of ranks, from any step, read in blocks."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import MicroBatch, SampleOrder

shard_sizes = st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) >= 64).map(tuple)
blocks = st.tuples(st.sampled_from([1, 2, 4, 8, 32]), st.sampled_from([1, 2, 5, 1 << 30]))  # lanes, window


def joined(batches: list[MicroBatch]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([b.samples for b in batches]), np.concatenate([b.views for b in batches])


@settings(deadline=None)
@given(shard_sizes, blocks, st.integers(0, 2**31 - 1), st.integers(0, 100))
def test_permutation_each_epoch(sizes: tuple[int, ...], block: tuple[int, int], seed: int, epoch: int) -> None:
    order = SampleOrder(sizes, 32, seed, *block)
    assert sorted(order.permutation(epoch)) == list(range(sum(sizes)))
    assert (order.permutation(epoch) != order.permutation(epoch + 1)).any()


@settings(deadline=None)
@given(shard_sizes, blocks, st.sampled_from([1, 2, 4, 8, 16, 32]), st.sampled_from([1, 2, 3]), st.integers(0, 11))
def test_ranks_and_resume_see_the_same_steps(
    sizes: tuple[int, ...], block: tuple[int, int], ranks: int, repeats: int, first: int
) -> None:
    """The union over ranks of step s is positions s*B .. (s+1)*B of the epoch, wherever reading begins."""
    order, last = SampleOrder(sizes, 32, 3, *block, repeats), 13
    micro = max(1, 32 // ranks // 2)
    alone = list(order.micro_batches(first, last, 0, 1, 32))
    by_rank = [list(order.micro_batches(first, last, rank, ranks, micro)) for rank in range(ranks)]
    per_step = 32 // ranks // micro
    assert all(len(batches) == (last - first) * per_step for batches in by_rank)
    for i, step in enumerate(range(first, last)):
        epoch, in_epoch = divmod(step, order.steps_per_epoch)
        parts = [part for batches in by_rank for part in batches[i * per_step : (i + 1) * per_step]]
        assert {part.epoch for part in parts} == {alone[i].epoch} == {epoch}
        samples, views = joined(parts)
        assert (samples == alone[i].samples).all()
        assert (views == alone[i].views).all()
        if repeats == 1:
            assert (samples == order.permutation(epoch)[in_epoch * 32 : (in_epoch + 1) * 32]).all()


@settings(deadline=None)
@given(shard_sizes, st.sampled_from([1, 4]), st.sampled_from([2, 3]))
def test_repeats(sizes: tuple[int, ...], lanes: int, repeats: int) -> None:
    """A sample stands `repeats` times in an epoch (cut at its end), each time another view, and no view comes twice."""
    order = SampleOrder(sizes, 32, 0, lanes, 2, repeats)
    samples, views = joined(list(order.micro_batches(0, 2 * order.steps_per_epoch, 0, 1, 32)))
    assert len(set(views.tolist())) == len(views)
    assert (views % order.samples == samples).all()
    counts = np.unique_counts(samples[: order.steps_per_epoch * 32]).counts
    assert counts.max() <= repeats
    assert (counts < repeats).sum() <= lanes


@settings(deadline=None)
@given(shard_sizes, blocks, st.sampled_from([1, 2, 4]), st.integers(0, 9), st.sampled_from([1, 2]))
def test_shards_ahead_are_those_that_are_read(
    sizes: tuple[int, ...], block: tuple[int, int], ranks: int, step: int, repeats: int
) -> None:
    order = SampleOrder(sizes, 32, 1, *block, repeats)
    ends = np.cumsum(sizes)
    for rank in range(ranks):
        ahead = order.shards_ahead(step, rank, ranks, windows=8)  # a step may span several tiny windows
        (now,) = order.micro_batches(step, step + 1, rank, ranks, 32 // ranks)
        assert set(np.searchsorted(ends, now.samples, side="right")) <= set(ahead)
        assert all(sizes[shard] for shard in ahead)


def test_lanes_keep_nodes_to_their_own_shards() -> None:
    """Four nodes on eight lanes: each reads a quarter of the shards, and only those of its two windows at a time."""
    order = SampleOrder((100,) * 64, 64, 0, lanes=8, window_shards=2)
    shards_by_node = [
        np.concatenate([batch.samples for batch in order.micro_batches(0, 100, rank, 4, 16)]) // 100
        for rank in range(4)
    ]
    assert all(len(set(shards)) <= 64 // 4 + 1 for shards in shards_by_node)
    for shards in shards_by_node:
        assert max(len(set(shards[i : i + 160].tolist())) for i in range(0, 1600, 160)) <= 2 * 5


def test_the_block_shuffle_is_uniform_enough() -> None:
    """Over many epochs a sample's position is uniform, and its neighbours change."""
    order = SampleOrder((20,) * 16, 32, 5, lanes=4, window_shards=2)
    positions = np.stack([np.argsort(order.permutation(epoch)) for epoch in range(2000)])
    assert abs(positions.mean(axis=0) - 159.5).max() < 5 * 92.4 / 2000**0.5  # five standard errors
    assert abs(positions.std(axis=0) - 92.4).max() < 6
    first, second = order.permutation(0), order.permutation(1)
    pairs = [set(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True)) for ids in (first, second)]
    assert len(pairs[0] & pairs[1]) < 20


def test_seeds_and_epochs_are_unrelated() -> None:
    a, b = SampleOrder((1000,), 10, 3).permutation(1), SampleOrder((1000,), 10, 4).permutation(0)
    assert (a == b).mean() < 0.02


def test_imagenet_22k_needs_little_memory() -> None:
    """14.2 M samples: the first batch of a late step, then an epoch of a rank of 512. A permutation takes 113 MB."""
    order = SampleOrder((10_000,) * 1420, 4096, 0, lanes=64, window_shards=4)
    tracemalloc.start()
    step = 89 * order.steps_per_epoch + 3000
    first = next(iter(order.micro_batches(step, step + 10, 100, 512, 8)))
    peak_first = tracemalloc.get_traced_memory()[1]
    ids = np.concatenate([batch.samples for batch in order.micro_batches(0, order.steps_per_epoch, 0, 512, 8)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first.epoch == 89
    assert peak_first < 10e6
    assert peak < 40e6
    assert len(set(ids.tolist())) == len(ids) == order.steps_per_epoch * 8
    assert len(set((ids // 10_000).tolist())) <= -(-1420 // 64) + 2  # those of one lane


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="10 training samples do not fill one global batch of 16"):
        SampleOrder((4, 6), 16, 0)
    with pytest.raises(ValueError, match=r"global_batch 16 is not divisible by data\.shuffle_lanes 3"):
        SampleOrder((40,), 16, 0, lanes=3)
