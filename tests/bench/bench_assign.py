"""Deciding the place of every image of ImageNet-22K: time and memory of the stage between reading and sharding.

    python tests/bench/bench_assign.py [--images 14197122] [--classes 21841] [--chunks 10000]

Rows are made up, of the sizes that the fall 2011 release would give; the tables of a few chunks are read for real and
scaled. Prints seconds, the peak of memory, and its ratio to one small dict a row.
"""

import argparse
import resource
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.build.assign import assign, load_rows
from data_prep.build.ingest import ROW_SCHEMA
from data_prep.ledger import Rows
from data_prep.storage import Folder

READ_CHUNKS = 100


def made_up_rows(images: int, classes: int, chunks: int) -> Rows:
    rng = np.random.default_rng(0)

    def hashes() -> np.ndarray:
        return rng.integers(0, 2**64, images, dtype=np.uint64)

    return Rows(
        chunks=[f"train-{number:06d}" for number in range(chunks)],
        start=np.linspace(0, images, chunks + 1).astype(np.int64),
        wnids=[f"n{number:08d}" for number in range(classes)],
        wnid=np.sort(rng.integers(0, classes, images)).astype(np.int32),
        split=np.zeros(images, np.int8),
        counted=np.ones(images, bool),
        order=hashes(),
        name_hash=hashes(),
        key_hash=hashes(),
        content_hash=hashes(),
        offset=rng.integers(0, 1 << 27, images),
        jpeg_bytes=rng.integers(10_000, 200_000, images).astype(np.int32),
        tail_bytes=np.full(images, 180, np.int32),
    )


def seconds_to_load(rows_per_chunk: int, chunks: int) -> float:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as path:
        names = [f"train-{number:06d}" for number in range(READ_CHUNKS)]
        row = dict.fromkeys(ROW_SCHEMA.names, 0) | dict.fromkeys(("wnid", "name", "split", "action"), "n01440764")
        row |= dict.fromkeys(("reason", "detail", "plain_key", "sha256"), "")
        for name in names:
            table = [row | {"order": int(rng.integers(1 << 62))} for _ in range(rows_per_chunk)]
            pq.write_table(pa.Table.from_pylist(table, schema=ROW_SCHEMA), f"{path}/{name}.parquet", compression="zstd")
        begun = time.process_time()
        load_rows(Folder(path), names)
        return (time.process_time() - begun) / READ_CHUNKS * chunks


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=14_197_122)
    parser.add_argument("--classes", type=int, default=21_841)
    parser.add_argument("--chunks", type=int, default=10_000)
    options = parser.parse_args()
    load = seconds_to_load(options.images // options.chunks, options.chunks)
    print(f"reading {options.chunks:,} tables (scaled from {READ_CHUNKS}): {load:.0f} CPU-s")
    before = peak_bytes()
    rows = made_up_rows(options.images, options.classes, options.chunks)
    begun = time.process_time()
    chosen = assign(
        rows, Folder("."), rows.wnids, max_images_per_class=None, val_per_class=50, duplicates="leaks", exclude=()
    )
    seconds = time.process_time() - begun
    memory = peak_bytes() - before
    print(
        f"{options.images:,} rows: {seconds:.1f} CPU-s, "
        f"peak {memory / 1e6:,.0f} MB, {memory / options.images:.0f} B a row"
    )
    print(f"train {len(chosen.order['train']):,}, val {len(chosen.order['val']):,}")
    row = {"wnid": "n01440764", "name": "n01440764_10026.JPEG", "order": 1 << 63, "offset": 1 << 30}
    one = sys.getsizeof(row) + sum(map(sys.getsizeof, row.values()))
    print(f"a dict a row, of four fields: {one} B; ours to that {memory / options.images / one:.2f}")


if __name__ == "__main__":
    main()
