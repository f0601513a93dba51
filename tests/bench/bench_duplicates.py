"""Finding near hashes at the size of ImageNet-22K against comparing every hash with every other; and hashing itself.

    python tests/bench/bench_duplicates.py [--train 14000000] [--val 50000] [--within 4000000] [--max-distance 4]

Hashes are random, with near ones planted: every planted one has to be found, and as many in all as brute force finds on
the part of it that it has time for. Prints seconds, peak memory, and the ratio to brute force (XOR and
popcount in numpy, measured on a part and scaled). The search within a set is measured at two sizes; the figure for all
of train is scaled from them.
"""

from __future__ import annotations

import argparse
import io
import math
import time
import tracemalloc
from collections.abc import Callable
from typing import TypeVar

import imagehash
import numpy as np
from PIL import Image

from data_prep.duplicates.hamming import Hashes, Pairs, choose_blocks, near_pairs, near_pairs_within
from data_prep.duplicates.hashing import hash_image

BRUTE_ROWS = 4096
PLANTED = 1000
R = TypeVar("R")


def timed(function: Callable[..., R], *arguments: object) -> tuple[R, float]:
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def timed_with_memory(function: Callable[..., R], *arguments: object) -> tuple[R, float, int]:
    """Also the most that was allocated at once, MB, numpy's arrays included."""
    tracemalloc.start()
    result, seconds = timed(function, *arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, seconds, peak >> 20


def hashes(count: int, seed: int, near_to: Hashes | None, max_distance: int) -> Hashes:
    """Random hashes; the first PLANTED are those of `near_to` with up to max_distance bits flipped."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**64, count, dtype=np.uint64)
    if near_to is not None:
        values[:PLANTED] = near_to[:PLANTED]
        for place in range(PLANTED):
            for bit in rng.choice(64, rng.integers(0, max_distance + 1), replace=False):
                values[place] ^= np.uint64(1) << np.uint64(bit)
    return values


def brute_force(a: Hashes, b: Hashes, max_distance: int) -> int:
    """Pairs within max_distance, (256, 4096) at a time: what fits into the caches."""
    found = 0
    for i in range(0, len(a), 256):
        for j in range(0, len(b), 4096):
            apart = np.bitwise_count(a[i : i + 256, None] ^ b[None, j : j + 4096])
            found += int(np.count_nonzero(apart <= max_distance))
    return found


def planted_found(pairs: Pairs) -> int:
    return int(((pairs[0] == pairs[1]) & (pairs[0] < PLANTED)).sum())


def bench_against(train_count: int, val_count: int, max_distance: int) -> None:
    train = hashes(train_count, 0, None, max_distance)
    val = hashes(val_count, 1, train, max_distance)
    pairs, seconds, used_mb = timed_with_memory(near_pairs, train, val, max_distance)
    assert planted_found(pairs) == PLANTED, "exact means that none is missed"
    part = train[:BRUTE_ROWS]
    expected, brute_seconds = timed(brute_force, part, val, max_distance)
    assert expected == int((pairs[0] < BRUTE_ROWS).sum())
    brute_seconds *= train_count / BRUTE_ROWS
    print(
        f"against: {train_count:,} x {val_count:,} within {max_distance} bits: {seconds:.1f} s, {used_mb:,} MB beside "
        f"the hashes ({train.nbytes >> 20} MB), {len(pairs[0]):,} pairs; brute force {brute_seconds:,.0f} s: "
        f"ratio {brute_seconds / seconds:,.0f}"
    )


def bench_within(count: int, full: int, max_distance: int) -> None:
    measured = []
    for size in (count // 4, count):
        original = hashes(size // 2, 2, None, max_distance)
        train = np.concatenate([hashes(size - len(original), 3, original, max_distance), original])
        pairs, seconds, used_mb = timed_with_memory(near_pairs_within, train, max_distance)
        assert int((pairs[1] - pairs[0] == size - len(original)).sum()) >= PLANTED
        measured.append((size, seconds))
        blocks = choose_blocks(max_distance, 100.0 * size, size**2 / 2)
        print(
            f"within: {size:,} within {max_distance} bits: {seconds:.1f} s, {used_mb:,} MB beside the hashes "
            f"({train.nbytes >> 20} MB), {len(pairs[0]):,} pairs, {blocks} blocks"
        )
    _, brute_seconds = timed(brute_force, train[:256], train, max_distance)
    size, seconds = measured[-1]
    brute_seconds *= size / 256 / 2  # each pair once
    growth = math.log(measured[1][1] / measured[0][1]) / math.log(measured[1][0] / measured[0][0])
    print(
        f"within: brute force at {size:,}: {brute_seconds:,.0f} s: ratio {brute_seconds / seconds:,.0f}; time grows "
        f"with n^{growth:.2f}: about {seconds * (full / size) ** growth:,.0f} s for {full:,}"
    )


def bench_hashing(count: int = 300, side: int = 400) -> None:
    """Scaled gray decode against pHash of the whole picture, on pictures with the spectrum of photos."""
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(count):
        picture = np.zeros((side, side, 3))
        for cells in (4, 8, 16, 32, 64, 128):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            picture += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), dtype=float) / cells * 2.5
        file = io.BytesIO()
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        jpegs.append(file.getvalue())
    whole, whole_seconds = timed(
        lambda: [int(str(imagehash.phash(Image.open(io.BytesIO(data)))), 16) for data in jpegs]
    )
    ours, seconds = timed(lambda: [hash_image(data).plain for data in jpegs])
    apart = np.bitwise_count(np.array(whole, np.uint64) ^ np.array(ours, np.uint64))
    shares = ", ".join(f"{bits}: {share:.1%}" for bits, share in enumerate(np.bincount(apart) / count) if share)
    print(
        f"hashing {side} x {side} pixels: {count / seconds:,.0f} images/s a core with the mirror image's, "
        f"{count / whole_seconds:,.0f} with a full decode and without it: ratio {whole_seconds / seconds:.2f}; "
        f"bits apart: {shares}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=14_000_000)
    parser.add_argument("--val", type=int, default=50_000)
    parser.add_argument("--within", type=int, default=4_000_000)
    parser.add_argument("--max-distance", type=int, default=4)
    options = parser.parse_args()
    bench_hashing()
    bench_against(options.train, options.val, options.max_distance)
    bench_within(options.within, options.train, options.max_distance)


if __name__ == "__main__":
    main()
