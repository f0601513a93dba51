"""Which sample stands at which position of training: a pure function of (seed, epoch, position).

Position p of an epoch belongs to optimizer step p // global_batch. Rank r of R takes the r-th of R equal slices of each
global batch, so the samples of a step are the same for every number of ranks, of workers, and for both file formats.
The state of the data is therefore one integer: the number of optimizer steps done.

The shuffle is by blocks, so that reading stays nearly sequential. Each epoch permutes the shards and lays them end to
end; the line is cut into `lanes` equal lanes, of which every global batch takes equal parts; and within a lane, samples
are shuffled inside windows of `window_shards` shards' worth. A batch is thus drawn from
lanes x window_shards shards, while a node that owns some of the lanes (all nodes do, where their number divides
`lanes`) opens only the windows of its own. Shards are uniform draws of the whole set, so that the blocks differ by
chance alone. With lanes=1 and a window that holds all shards the order is one uniform permutation.

A set that is read as a stream (pipeline/data/stream/) has the same order with another window: `buffer_samples` of a
lane, which may begin and end in the middle of a shard, and shards that run forwards alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from data_prep.manifest import Manifest, ManifestError
from pipeline.config.fields import is_stream_of_urls
from pipeline.config.load import Config
from pipeline.data.keyed import uniform_one, view_numbers

_CHUNK_IDS = 1 << 16  # computed at once: numpy's overhead is spread, memory stays small
_KEPT_SAMPLES, _KEPT_WINDOWS = 1 << 24, 1024  # 64 MB: 64 lanes of 40,000 samples are a sixth of it


class MicroBatch(NamedTuple):
    """One forward pass of one rank: `samples` int64 (micro_batch,), and `views`, what their augmentation is keyed by.

    `step` counts from the run's beginning.
    """

    step: int
    epoch: int
    samples: np.ndarray
    views: np.ndarray


@dataclass(frozen=True)
class SampleOrder:
    """The order of a split's samples in global batches, shuffled anew each epoch.

    `shard_samples` are the samples of each shard, in the manifest's order. With `repeats` > 1 (repeated augmentation,
    Hoffer et al., 2020) each sample stands that often in a row, differently augmented, and an epoch of as many steps
    covers 1/repeats of the set. The last samples % global_batch positions of an epoch are left out of it.
    `buffer_samples` is for streams: the samples of a window, in place of `window_shards`.
    Raises ValueError if there are fewer samples than one global batch holds, or lanes do not divide the batch.
    """

    shard_samples: tuple[int, ...]
    global_batch: int
    seed: int
    lanes: int = 1
    window_shards: int = 1 << 30
    repeats: int = 1
    buffer_samples: int | None = None

    def __post_init__(self) -> None:
        if self.samples < self.global_batch:
            raise ValueError(
                f"{self.samples} training samples do not fill one global batch of {self.global_batch}; "
                f"lower train.global_batch"
            )
        if self.global_batch % self.lanes:
            raise ValueError(
                f"train.global_batch {self.global_batch} is not divisible by data.shuffle_lanes {self.lanes}"
            )

    @cached_property
    def samples(self) -> int:
        return sum(self.shard_samples)

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch

    def permutation(self, epoch: int) -> np.ndarray:
        """All sample ids by position, int64 (samples,), repeats aside; those past the last full step come last."""
        steps, part = self.steps_per_epoch, self.global_batch // self.lanes
        lanes = [self._lane(epoch, lane, 0, self._lane_samples) for lane in range(self.lanes)]
        full = np.stack([ids[: steps * part].reshape(steps, part) for ids in lanes], axis=1)
        rest = self._blocks(epoch).samples_at(np.arange(self.lanes * self._lane_samples, self.samples))
        return np.concatenate([full.reshape(-1), *(ids[steps * part :] for ids in lanes), rest])

    def rank_steps(self, epoch: int, first: int, last: int, rank: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples, views), each int64 (last - first, global_batch // ranks): one rank's part of an epoch's steps."""
        part, mine = self.global_batch // self.lanes, self.global_batch // ranks
        begin, end = rank * mine, (rank + 1) * mine
        pieces = []
        for lane in range(begin // part, -(-end // part)):
            stream = self._repeated(epoch, lane, first * part, last * part).reshape(2, last - first, part)
            pieces.append(stream[:, :, max(0, begin - lane * part) : end - lane * part])
        samples, repeat = np.concatenate(pieces, axis=2)
        return samples, view_numbers(epoch, repeat, self.repeats, samples, self.samples)

    def micro_batches(
        self, first_step: int, last_step: int, rank: int, ranks: int, micro_batch: int
    ) -> Iterator[MicroBatch]:
        """One rank's micro-batches for the run's steps first_step .. last_step - 1, across epochs. O(1) to begin."""
        chunk = max(1, _CHUNK_IDS // self.global_batch)
        step = first_step
        while step < last_step:
            epoch, first = divmod(step, self.steps_per_epoch)
            last = min(first + chunk, self.steps_per_epoch, first + last_step - step)
            samples, views = self.rank_steps(epoch, first, last, rank, ranks)
            for row in range(last - first):
                for start in range(0, samples.shape[1], micro_batch):
                    part = slice(start, start + micro_batch)
                    yield MicroBatch(step + row, epoch, samples[row, part], views[row, part])
            step += last - first

    def shards_ahead(self, step: int, rank: int, ranks: int, windows: int = 2) -> list[int]:
        """Shards that `rank` reads from the run's step `step` on, soonest first: those of the windows that its lanes
        are in, then those of the next, in all `windows` of them, into the next epoch where this one ends.
        """
        part = self.global_batch // self.lanes
        lanes = self.lanes_of(rank, ranks)
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        found: dict[int, None] = {}  # an ordered set
        at = dict.fromkeys(lanes, (epoch, in_epoch * part // self.repeats))
        for _ in range(windows):
            for lane, (lane_epoch, index) in at.items():
                begin, end = self._window(lane_epoch, lane, index)
                blocks = self._blocks(lane_epoch)
                start = lane * self._lane_samples
                found |= dict.fromkeys(blocks.shards_between(start + begin, start + end))
                over = end * self.repeats >= self.steps_per_epoch * part
                at[lane] = (lane_epoch + 1, 0) if over else (lane_epoch, end)
        return list(found)

    def lanes_of(self, rank: int, ranks: int) -> range:
        """The lanes that a rank reads; some in part where ranks do not divide them."""
        part, mine = self.global_batch // self.lanes, self.global_batch // ranks
        return range(rank * mine // part, -(-(rank + 1) * mine // part))

    def lane_of(self, place_in_batch: int) -> int:
        """The lane that a place of the global batch is taken from."""
        return place_in_batch // (self.global_batch // self.lanes)

    def stream(self, epoch: int, lane: int, first_step: int) -> Iterator[tuple[int, int, int]]:
        """(shard, skipped, taken) of a lane from the window on that step `first_step` of the epoch begins in: which
        shards to read in turn, how many samples of each to read past and how many to take. For streams.
        """
        index = first_step * (self.global_batch // self.lanes) // self.repeats
        start = lane * self._lane_samples
        begin = start + self._window(epoch, lane, index)[0] if index < self._lane_samples else start + index
        return self._blocks(epoch).pieces(begin, start + self._lane_samples)

    def taken_before(self, epoch: int, lane: int, first_step: int) -> np.ndarray:
        """Sample ids of the window that step `first_step` of the epoch begins in, which the lane gave before it."""
        index = first_step * (self.global_batch // self.lanes) // self.repeats
        if index >= self._lane_samples:
            return np.zeros(0, np.int64)
        return self._lane(epoch, lane, self._window(epoch, lane, index)[0], index)

    @property
    def _lane_samples(self) -> int:
        return self.samples // self.lanes

    def _blocks(self, epoch: int) -> _BlockOrder:
        return _block_order(self.shard_samples, self.seed, epoch, self.buffer_samples is not None)

    @cached_property
    def _window_samples(self) -> int:
        if self.buffer_samples is not None:
            return min(self.samples, self.buffer_samples)
        mean = -(-self.samples // len(self.shard_samples))
        return min(self.samples, self.window_shards * mean)

    def _window(self, epoch: int, lane: int, index: int) -> tuple[int, int]:
        """Begin and end of the window that a lane's position `index` lies in."""
        # Lanes change windows one after the other: not all shards of a node have to be fetched at the same moment.
        phase = lane * self._window_samples // self.lanes
        if self.buffer_samples is not None:  # else the same samples of a shard would stay together
            phase += int(uniform_one((self.seed << 32) ^ epoch, lane) * self._window_samples)
            phase %= self._window_samples
        number = (index + phase) // self._window_samples
        begin = number * self._window_samples - phase
        return max(0, begin), min(self._lane_samples, begin + self._window_samples)

    def _lane(self, epoch: int, lane: int, first: int, last: int) -> np.ndarray:
        """Sample ids at a lane's positions first .. last - 1, int64."""
        blocks = self._blocks(epoch)
        places = []
        while first < last:
            begin, end = self._window(epoch, lane, first)
            stop = min(end, last)
            shuffled = _windows.order(self.seed, epoch, lane, begin, end - begin)
            places.append(shuffled[first - begin : stop - begin] + (begin + lane * self._lane_samples))
            first = stop
        return blocks.samples_at(np.concatenate([*places, np.zeros(0, np.int64)]))

    def _repeated(self, epoch: int, lane: int, first: int, last: int) -> np.ndarray:
        """Sample ids and their repeat numbers at a lane's positions, int64 (2, last - first)."""
        n = self.repeats
        ids = self._lane(epoch, lane, first // n, -(-last // n))
        both = np.stack([np.repeat(ids, n), np.tile(np.arange(n), len(ids))])
        return both[:, first % n : first % n + last - first]


@dataclass(frozen=True, eq=False)
class _BlockOrder:
    """The shards of an epoch, permuted and laid end to end in a ring: `ends[i]` is where the i-th of them ends.

    Windows cut some shards in two. The line begins anywhere on the ring (`shift`) and runs through each shard forwards
    or backwards (`mirrored`), or the same samples of a shard would stay together, and its first ones come early.
    """

    shards: np.ndarray
    ends: np.ndarray
    first_ids: np.ndarray  # of the i-th shard on the ring: the id of its first sample
    sizes: np.ndarray
    shift: int
    mirrored: bool

    def samples_at(self, places: np.ndarray) -> np.ndarray:
        """Sample ids at places on the line."""
        places = (places + self.shift) % self.ends[-1]
        block = np.searchsorted(self.ends, places, side="right")
        inside = places - (self.ends[block] - self.sizes[block])
        return self.first_ids[block] + (self.sizes[block] - 1 - inside if self.mirrored else inside)

    def shards_between(self, begin: int, end: int) -> list[int]:
        """Shards that the places begin .. end - 1 lie in, in the order of the line."""
        ring = int(self.ends[-1])
        begin, end = (begin + self.shift) % ring, (begin + self.shift) % ring + end - begin
        parts = [(begin, min(end, ring)), (0, max(0, end - ring))]
        found: list[int] = []
        for low, high in parts:
            if low < high:
                first, last = np.searchsorted(self.ends, [low, high - 1], side="right")
                found += self.shards[first : last + 1][self.sizes[first : last + 1] > 0].tolist()
        return found

    def pieces(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(shard, skipped, taken) for each shard that the places begin .. end - 1 of an unshifted line lie in."""
        first = int(np.searchsorted(self.ends, begin, side="right"))
        for block in range(first, len(self.shards)):
            start, size = int(self.ends[block] - self.sizes[block]), int(self.sizes[block])
            if start >= end:
                return
            skipped = max(0, begin - start)
            if taken := min(size, end - start) - skipped:
                yield int(self.shards[block]), skipped, taken


def _generator(seed: int, epoch: int, lane: int, begin: int) -> np.random.Generator:
    # Philox is counter-based: (seed, epoch) is its key, so (3, 1) and (4, 0) are unrelated streams; the upper half of
    # the counter keeps the streams within an epoch apart.
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, lane + 1, begin]))


def shuffled_shards(shards: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers of shards in the order of an epoch, int64 (shards,)."""
    return _generator(seed, epoch, -1, 0).permutation(shards)


def drawn_permutation(seed: int, step: int, length: int) -> np.ndarray:
    """int64 (length,): which place takes which of the samples of the run's step `step`, where sets are mixed."""
    return _generator(seed, step, -1, 1).permutation(length)


@lru_cache(maxsize=4)  # the epoch under way and the one that workers have begun to prefetch
def _block_order(shard_samples: tuple[int, ...], seed: int, epoch: int, streamed: bool) -> _BlockOrder:
    sizes = np.asarray(shard_samples, np.int64)
    random = _generator(seed, epoch, -1, 0)
    shards = random.permutation(len(sizes))  # first: shuffled_shards draws the same
    shift, mirrored = int(random.integers(sizes.sum())), bool(random.integers(2))
    if streamed:  # a stream has no way back, and its first lane begins where a shard does
        shift, mirrored = 0, False
    first_ids = (np.cumsum(sizes) - sizes)[shards]
    return _BlockOrder(shards, np.cumsum(sizes[shards]), first_ids, sizes[shards], shift, mirrored)


class _Windows(OrderedDict[tuple[int, ...], np.ndarray]):
    """The orders within the windows that lanes are in, bounded by bytes: the one window of an unblocked shuffle holds
    the whole set, while 64 lanes hold 64 small ones.
    """

    samples = 0

    def order(self, *window: int) -> np.ndarray:
        """The order within the window (seed, epoch, lane, begin, length): int32 (length,)."""
        found = self.get(window)
        if found is None:
            found = _generator(*window[:4]).permutation(window[4]).astype(np.int32)
            found.flags.writeable = False
            self[window] = found
            self.samples += len(found)
            while len(self) > 1 and (self.samples > _KEPT_SAMPLES or len(self) > _KEPT_WINDOWS):
                self.samples -= len(self.popitem(last=False)[1])
        self.move_to_end(window)
        return found


_windows = _Windows()


def validation_samples(config: Config, manifest: Manifest) -> int:
    """How many images each evaluation of the run looks at; 0 where the configuration asks for none.

    Raises ManifestError where it asks for some and there are none: no accuracy is better than a made-up one.
    """
    if config.evaluate.every_epochs is None:
        return 0
    samples = manifest.splits["val"].samples if "val" in manifest.splits else 0
    if not samples:
        how = "build the data set with --val-source or --val-per-class"
        if config.data.reader == "stream" and is_stream_of_urls(config.data.folder):
            how = "name validation shards in data.stream_val"
        raise ManifestError(
            f"{config.data.shown_path} has no validation images: set evaluate.every_epochs=null to train without any, "
            f"or {how}"
        )
    return samples
