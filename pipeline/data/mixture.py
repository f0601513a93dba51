"""Several data sets in one run, by weight: `data.path` as a list.

Of the run's first P samples, set i has given weight_i x P, give or take two, whatever P is: the sets take turns evenly,
and how far each has come is a closed form of the step. A set's own samples come in the order of `order.py`, in epochs
of its own, so that one of a tenth of the samples and half of the weight goes round more often. What stands where within
a global batch is drawn by (seed, step). A run is thus resumed exactly, on any number of ranks.

Classes are joined by WordNet id: those of the first set in its order, then of each further one those that are new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from pydantic import Field

from data_prep.manifest import Manifest, ManifestError, Split
from pipeline.config.data import Data, MixedSet
from pipeline.data.keyed import view_numbers
from pipeline.data.order import MicroBatch, SampleOrder, drawn_permutation
from pipeline.data.shards import DataError, ShardReader

_DENOMINATOR = 1 << 20  # weights are kept as fractions of about so much


class MixedManifest(Manifest):
    """The joined manifest of `parts`: classes and shards of all; `weights` add up to 1."""

    parts: tuple[Manifest, ...] = Field(exclude=True)
    weights: tuple[Fraction, ...] = Field(exclude=True)


def joined(sets: Sequence[MixedSet], parts: Sequence[Manifest]) -> MixedManifest:
    """The manifest of several sets. Raises ManifestError for one without training images or share, or listed twice."""
    for each, part in zip(sets, parts, strict=True):
        if "train" not in part.splits or not part.split("train").samples:
            raise ManifestError(f"{each.path} has no training images: leave it out of data.path")
    seen: dict[str, str] = {}
    for each, part in zip(sets, parts, strict=True):  # a link, another spelling, or a copy
        if seen.setdefault(part.dataset_id, each.path) != each.path:
            raise ManifestError(
                f"{seen[part.dataset_id]} and {each.path} in data.path are one set (id {part.dataset_id[:12]}): list "
                "it once, with the sum of the weights"
            )
    synsets = list(dict.fromkeys(wnid for part in parts for wnid in part.synsets))
    at = {wnid: number for number, wnid in enumerate(synsets)}
    splits = {}
    for name in ("train", "val"):
        counts, shards = np.zeros(len(synsets), np.int64), []
        for part in parts:
            if name in part.splits:
                counts[[at[wnid] for wnid in part.synsets]] += part.split(name).class_counts
                shards += part.split(name).shards
        if shards:
            splits[name] = Split(samples=int(counts.sum()), class_counts=counts.tolist(), shards=shards)
    total = sum(each.weight for each in sets)
    weights = tuple(Fraction(each.weight / total).limit_denominator(_DENOMINATOR) for each in sets)
    never = next((each for each, weight in zip(sets, weights, strict=True) if not weight), None)
    if never is not None:
        raise ManifestError(
            f"{never.path} has the weight {never.weight:g} of {total:g} in data.path, less than one sample in a "
            "million: give it more, or leave it out"
        )
    told = [f"{part.dataset_id} {weight}" for part, weight in zip(parts, weights, strict=True)]
    return MixedManifest(
        name=" + ".join(part.name for part in parts),
        dataset_id=hashlib.sha256("\n".join(told).encode()).hexdigest()[:32],
        synsets=synsets,
        splits=splits,
        settings={"mixed": told},
        parts=tuple(parts),
        weights=weights,
    )


@dataclass(frozen=True)
class MixedOrder:
    """The order of several sets' samples, with the methods of `SampleOrder`; ids count through the sets in turn.

    An epoch is as many samples as the sets hold together. Each of `parts` is the order of a set on its own, with a
    global batch of a sample a lane. Raises ValueError where a set holds fewer samples than there are lanes.
    """

    parts: tuple[SampleOrder, ...]
    weights: tuple[Fraction, ...]
    global_batch: int
    seed: int
    repeats: int = 1

    @cached_property
    def samples(self) -> int:
        return sum(part.samples for part in self.parts)

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch

    @cached_property
    def first_ids(self) -> np.ndarray:
        """The id of each set's first sample."""
        sizes = np.array([part.samples for part in self.parts])
        return np.cumsum(sizes) - sizes

    def taken_before(self, step: int) -> list[int]:
        """How many samples each set has given to the run's steps before `step`."""
        left, rest, counts = step * self.global_batch, Fraction(1), []
        for weight in self.weights:  # its share of what the sets before it left: one more, or none, at each position
            share = weight / rest if rest > 0 else Fraction(1)
            counts.append(left * min(share, Fraction(1)) // 1)
            left, rest = left - int(counts[-1]), rest - weight
        counts[-1] += left  # what rounding of the weights left over
        return [int(count) for count in counts]

    def global_step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples, views) of the run's step `step`, each int64 (global_batch,)."""
        samples, views = [], []
        counts = zip(self.taken_before(step), self.taken_before(step + 1), strict=True)
        for part, first_id, (begin, end) in zip(self.parts, self.first_ids, counts, strict=True):
            for epoch, ids, repeat in _stretch(part, begin, end):
                samples.append(first_id + ids)
                views.append(view_numbers(epoch, repeat, self.repeats, samples[-1], self.samples))
        shuffled = drawn_permutation(self.seed, step, self.global_batch)
        return np.concatenate(samples)[shuffled], np.concatenate(views)[shuffled]

    def rank_steps(self, epoch: int, first: int, last: int, rank: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples, views), each int64 (last - first, global_batch // ranks): one rank's part of an epoch's steps."""
        mine = self.global_batch // ranks
        steps = [self.global_step(epoch * self.steps_per_epoch + step) for step in range(first, last)]
        samples, views = (np.stack(column)[:, rank * mine : (rank + 1) * mine] for column in zip(*steps, strict=True))
        return samples, views

    def micro_batches(
        self, first_step: int, last_step: int, rank: int, ranks: int, micro_batch: int
    ) -> Iterator[MicroBatch]:
        """One rank's micro-batches for the run's steps first_step .. last_step - 1, across epochs. O(1) to begin."""
        mine = self.global_batch // ranks
        for step in range(first_step, last_step):
            samples, views = self.global_step(step)
            for start in range(rank * mine, (rank + 1) * mine, micro_batch):
                part = slice(start, start + micro_batch)
                yield MicroBatch(step, step // self.steps_per_epoch, samples[part], views[part])

    def shards_ahead(self, step: int, rank: int, ranks: int) -> list[int]:
        """Shards that are read from the run's step `step` on, in the joined manifest's numbers: of every rank, since
        each takes some of all lanes.
        """
        found, first = [], 0
        for part, taken in zip(self.parts, self.taken_before(step), strict=True):
            found.append([first + shard for shard in part.shards_ahead(taken // part.lanes, 0, 1)])
            first += len(part.shard_samples)
        longest = max(map(len, found))
        return [shards[turn] for turn in range(longest) for shards in found if turn < len(shards)]


TrainingOrder = SampleOrder | MixedOrder


def _stretch(part: SampleOrder, begin: int, end: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(epoch, ids, repeat numbers) of the samples begin .. end - 1 that a set gives, epoch by epoch."""
    in_epoch = part.steps_per_epoch * part.lanes
    while begin < end:
        epoch, first = divmod(begin, in_epoch)
        stop = min(first + end - begin, in_epoch)
        steps = (first // part.lanes, -(-stop // part.lanes))
        ids, views = part.rank_steps(epoch, *steps, 0, 1)
        taken = slice(first - steps[0] * part.lanes, stop - steps[0] * part.lanes)
        repeat = views // part.samples - epoch * part.repeats
        yield epoch, ids.reshape(-1)[taken], repeat.reshape(-1)[taken]
        begin += stop - first


def mixed_order(manifest: MixedManifest, data: Data, global_batch: int, seed: int, repeats: int) -> MixedOrder:
    """The order of the joined training splits. Raises ValueError where it does not fill a global batch."""
    parts = []
    for part in manifest.parts:
        sizes = tuple(entry.samples for entry in part.split("train").shards)
        if sum(sizes) < data.shuffle_lanes:
            raise ValueError(f"{part.name} has {sum(sizes)} training images, fewer than data.shuffle_lanes: lower that")
        lanes, window = data.shuffle_lanes, data.shuffle_window_shards
        parts.append(SampleOrder(sizes, lanes, seed, lanes, window, repeats))
    order = MixedOrder(tuple(parts), manifest.weights, global_batch, seed, repeats)
    if not order.steps_per_epoch:
        raise ValueError(f"{order.samples} training samples do not fill one global batch of {global_batch}")
    return order


class MixedReader:
    """The encoded images and labels of a split of several sets, by the joined sample id: as `ShardReader`."""

    random_access = True

    def __init__(self, data: Data, manifest: MixedManifest, split: str) -> None:
        at = {wnid: number for number, wnid in enumerate(manifest.synsets)}
        self._readers: list[ShardReader] = []
        self._labels: list[np.ndarray] = []
        for each, part in zip(data.sets, manifest.parts, strict=True):
            if split in part.splits:
                self._readers.append(ShardReader(data.model_copy(update={"path": each.path}), part, split))
                self._labels.append(np.array([at[wnid] for wnid in part.synsets]))
        self._ends = np.cumsum([len(reader) for reader in self._readers])
        self._shard_ends = np.cumsum([reader.shard_count for reader in self._readers])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shard_count(self) -> int:
        return int(self._shard_ends[-1])

    @property
    def remote(self) -> object:
        return next((reader.remote for reader in self._readers if reader.remote is not None), None)

    @property
    def fetch_threads(self) -> int | None:
        return 0 if self.remote is not None else None

    def encoded_many(self, samples: Sequence[int] | np.ndarray) -> list[bytes | DataError]:
        """Of each set those that are its own, at a time."""
        wanted = np.asarray(samples, np.int64)
        owner = np.searchsorted(self._ends, wanted, side="right")
        found: list[bytes | DataError] = [DataError("not read")] * len(wanted)
        for number in np.unique(owner).tolist():
            places = np.flatnonzero(owner == number)
            inside = wanted[places] - self._first(number)
            for place, data in zip(places.tolist(), self._readers[number].encoded_many(inside), strict=True):
                found[place] = data
        return found

    def encoded_batch(self, micro: MicroBatch) -> Sequence[bytes | DataError]:
        return self.encoded_many(micro.samples)

    def label(self, sample: int) -> int:
        """The class number of a sample in the joined `synsets`."""
        number, inside = self._own(sample)
        return int(self._labels[number][self._readers[number].label(inside)])

    def label_of(self, sample: int, data: bytes) -> int:
        return self.label(sample)

    def damaged(self, sample: int, reason: object, data: bytes = b"") -> DataError:
        number, inside = self._own(sample)
        return self._readers[number].damaged(inside, reason)

    def ahead(self, shards: Sequence[int]) -> None:
        """Shards by their numbers in the joined manifest."""
        ends = self._shard_ends
        for number, reader in enumerate(self._readers):
            first = int(ends[number]) - reader.shard_count
            reader.ahead([shard - first for shard in shards if first <= shard < int(ends[number])])

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def _first(self, number: int) -> int:
        return int(self._ends[number]) - len(self._readers[number])

    def _own(self, sample: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._ends, sample, side="right"))
        return number, sample - self._first(number)
