"""What a rank pays before its first batch on a set of ImageNet-22K's size: 14.2 M samples in 1,420 shards of 1 GB.

The shards are sparse files that hold one real image at every indexed place, so that nothing but disk space is missing.

    python tests/bench/bench_start.py
"""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.manifest import Manifest, ShardEntry, ShardIndex, Split, index_path

SHARDS, SAMPLES, SHARD_BYTES = 1420, 10_000, 10**9
CHILD = """
import json, resource, sys, time
from pathlib import Path
from data_prep.manifest import Manifest
from pipeline.config.load import load
from pipeline.data.loader import training_batches
from pipeline.data.opened import training_order
from pipeline.ranks.collectives import Ranks
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
overrides = [f"data.path={sys.argv[1]}", f"data.workers_per_rank={sys.argv[2]}"]
config = load("configs/pretrain_hornet_l_in22k_384.yaml", overrides)
started, cpu = time.monotonic(), time.process_time()
manifest = Manifest.load(config.data.path)
order = training_order(config, manifest)
step = 89 * order.steps_per_epoch + 1234  # late in the run: a resume
batches = training_batches(config, manifest, order, Ranks(100, 512), step, step + 8)
batch = next(batches)
seconds, spent = time.monotonic() - started, time.process_time() - cpu
assert batch.images.shape[1:] == (3, 384, 384)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"seconds": seconds, "cpu": spent, "mb": grown / 1024}))
"""


def build(folder: Path) -> None:
    """1,420 sparse shards, one index file under 1,420 names, and the manifest."""
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(picture, "JPEG")
    data = picture.getvalue()
    first = folder / "train-000000.tar"
    offsets = np.arange(SAMPLES, dtype=np.int64) * (SHARD_BYTES // SAMPLES)
    with open(first, "wb") as file:
        for offset in offsets:
            file.seek(int(offset))
            file.write(data)
        file.truncate(SHARD_BYTES)
    keys = np.array([f"n{i:08}_{i}" for i in range(SAMPLES)])
    sizes = np.full(SAMPLES, len(data))
    ShardIndex(keys, offsets, sizes, np.zeros(SAMPLES, np.int32)).save(folder / index_path(first.name))
    entries = []
    for number in range(SHARDS):
        name = f"train-{number:06}.tar"
        if number:
            (folder / name).hardlink_to(first)
            (folder / index_path(name)).hardlink_to(folder / index_path(first.name))
        entries.append(ShardEntry(file=name, samples=SAMPLES, bytes=SHARD_BYTES, sha256="0" * 64))
    split = Split(samples=SHARDS * SAMPLES, class_counts=[SHARDS * SAMPLES], shards=entries)
    Manifest(name="sparse-22k", dataset_id="0" * 64, synsets=["n00000001"], splits={"train": split}).save(folder)


def main() -> None:
    """Build the set, read one batch in a fresh process, print what it took."""
    with tempfile.TemporaryDirectory() as name:
        build(Path(name))
        for workers in ("0", "1"):
            done = subprocess.run(
                [sys.executable, "-c", CHILD, name, workers], capture_output=True, text=True, check=True
            )
            result = json.loads(done.stdout)
            print(
                f"workers {workers}: {result['seconds']:.2f} s ({result['cpu']:.2f} CPU-s) from opening the set to the "
                f"first batch, {result['mb']:.0f} MB more resident; target < 5 s"
            )
    print(f"(largest child {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MB, imports included)")


if __name__ == "__main__":
    main()
