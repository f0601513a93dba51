"""All pairs of 64-bit hashes that differ in few bits: exact, without comparing every hash with every other.

The 64 bits are cut into blocks. Two hashes that differ in at most d bits agree in all but d blocks, so for one of the
ways to leave out d blocks they agree in everything that is left: candidates are the hashes that are equal under that
mask, and only those are compared.
"""

import math
from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from data_prep.storage import DataPrepError

Hashes = NDArray[np.uint64]
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]  # positions in a and in b, bits apart

HASH_BITS = 64
MAX_PAIRS = 50_000_000  # 850 MB; more is no list of duplicates but a distance that is too large
_ROWS = 1 << 20  # of a, worked on at once: temporary arrays of 8 MiB
_CANDIDATES = 1 << 21  # compared at once
_SLOT_BITS = 22
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # multiplicative hashing (Knuth): the upper bits depend on all lower ones

# Costs for the choice of the number of blocks, ns, measured on one core; only their ratio matters.
_SORT_NS = 100.0
_FILTER_NS = 10.0
_COMPARE_NS = 20.0


class TooManyPairs(DataPrepError):
    """More pairs are near each other than can be listed."""


def near_pairs(a: Hashes, b: Hashes, max_distance: int) -> Pairs:
    """Every (i, j) for which a[i] and b[j] differ in at most `max_distance` bits, once; b should be the smaller."""
    found = _Found(a, b, max_distance)
    if not (len(a) and len(b)):
        return found.pairs()
    per_mask_ns = _FILTER_NS * len(a) + _SORT_NS * len(b)
    for mask in found.masks(per_mask_ns, len(a) * len(b)):
        masked = b & mask
        order = np.argsort(masked)
        masked = masked[order]
        # Most rows of a meet nothing in b: a table of what b holds says so at the price of one look-up.
        holds = np.zeros(1 << _SLOT_BITS, dtype=bool)
        holds[_slot(masked)] = True
        for start in range(0, len(a), _ROWS):
            part = a[start : start + _ROWS] & mask
            hit = np.flatnonzero(holds[_slot(part)])
            first = np.searchsorted(masked, part[hit], "left")
            last = np.searchsorted(masked, part[hit], "right")
            for left, right in _expand(first, last):
                found.add(start + hit[left], order[right])
    return found.pairs()


def near_pairs_within(a: Hashes, max_distance: int) -> Pairs:
    """Every (i, j) with i < j for which a[i] and a[j] differ in at most `max_distance` bits, once."""
    found = _Found(a, a, max_distance)
    if len(a) < 2:
        return found.pairs()
    for mask in found.masks(_SORT_NS * len(a), len(a) ** 2 / 2):
        masked = a & mask
        order = np.argsort(masked)
        masked = masked[order]
        begins = np.flatnonzero(np.concatenate(([True], masked[1:] != masked[:-1])))
        lengths = np.diff(begins, append=len(a))
        shared = np.flatnonzero(lengths > 1)
        for start in range(0, len(shared), _ROWS):
            runs = shared[start : start + _ROWS]
            # Each member of a run is compared with those after it.
            member = _ranges(begins[runs], lengths[runs])
            last = np.repeat(begins[runs] + lengths[runs], lengths[runs])
            for left, right in _expand(member + 1, last):
                one, other = order[member[left]], order[right]
                found.add(np.minimum(one, other), np.maximum(one, other))
    return found.pairs()


class _Found:
    """The pairs found so far, and the masks under which they are looked for."""

    def __init__(self, a: Hashes, b: Hashes, max_distance: int):
        if not 0 <= max_distance < HASH_BITS:
            raise ValueError(f"a distance of {max_distance} bits is not in 0..{HASH_BITS - 1}")
        self.a, self.b, self.max_distance = a, b, max_distance
        self.count = 0
        self._parts: list[Pairs] = []
        self._earlier: list[np.uint64] = []

    def masks(self, per_mask_ns: float, pairs: float) -> Iterator[np.uint64]:
        """Yield the masks; `add` then takes what agrees under the latest one."""
        for mask in block_masks(self.max_distance, choose_blocks(self.max_distance, per_mask_ns, pairs)):
            yield mask
            self._earlier.append(mask)

    def add(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> None:
        apart = self.a[i] ^ self.b[j]
        distance = np.bitwise_count(apart)
        near = np.flatnonzero(distance <= self.max_distance)
        i, j, apart, distance = i[near], j[near], apart[near], distance[near]
        fresh = np.ones(len(i), dtype=bool)
        for mask in self._earlier:  # a pair that agrees under an earlier mask was found there
            fresh &= (apart & mask) != 0
        if fresh.any():
            self._parts.append((i[fresh], j[fresh], distance[fresh]))
            self.count += int(fresh.sum())
        if self.count > MAX_PAIRS:
            raise TooManyPairs(
                f"more than {MAX_PAIRS:,} pairs of images are within {self.max_distance} bits of each other: "
                "use a smaller --max-distance"
            )

    def pairs(self) -> Pairs:
        """All pairs, ordered by i, then j."""
        if not self._parts:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8)
        i, j, distance = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.lexsort((j, i))
        return i[order], j[order], distance[order]


def block_masks(max_distance: int, blocks: int) -> list[np.uint64]:
    """The masks that leave out `max_distance` of `blocks` blocks of the 64 bits."""
    edges = np.linspace(0, HASH_BITS, blocks + 1).round().astype(int).tolist()
    values = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    return [np.uint64(sum(kept)) for kept in combinations(values, blocks - max_distance)]


def choose_blocks(max_distance: int, per_mask_ns: float, pairs: float) -> int:
    """The number of blocks for which masks (more blocks) and candidates (fewer blocks) together cost least."""

    def cost_ns(blocks: int) -> float:
        agreeing_bits = HASH_BITS * (blocks - max_distance) / blocks
        return math.comb(blocks, max_distance) * (per_mask_ns + _COMPARE_NS * pairs / 2**agreeing_bits)

    return min(range(max_distance + 1, min(max_distance + 9, HASH_BITS) + 1), key=cost_ns)


def _slot(values: Hashes) -> NDArray[np.int64]:
    return ((values * _GOLDEN) >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)


def _ranges(first: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """first[0], first[0] + 1, ... (lengths[0] of them), first[1], ..."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - lengths), lengths)


def _expand(first: NDArray[np.int64], last: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (k, position) for every position in [first[k], last[k]), about _CANDIDATES at a time."""
    lengths = last - first
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _CANDIDATES, "right")))
        length = lengths[start:stop]
        if length.any():
            yield np.repeat(np.arange(start, stop), length), _ranges(first[start:stop], length)
        start = stop
