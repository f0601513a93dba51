#!/usr/bin/env bash
# webdataset 1.0.2: a shuffle with a seed gives one and the same order in every epoch.
#
# One would guess: the seed makes a run repeatable, and the epochs of one run still differ, as they do with a seeded
#   generator in torch's RandomSampler.
# What happens: `.shuffle(n, seed=s)` and `shardshuffle=n` with `seed=s` start their generator afresh at each pass: all
#   epochs see one order. `detshuffle` counts epochs, but inside the object: each copy begins at the first epoch again,
#   and the workers that a DataLoader starts for each epoch get copies.
# Whom it hurts: training by epochs. Batches hold the same samples in every epoch, and no number in the log says so.
# Instead: put the epoch into the seed and make the pipeline anew for each epoch; or detshuffle with persistent workers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6

venv/bin/python -I - <<'PYTHON'
import copy
import sys

import webdataset as wds

print("webdataset", wds.__version__)
shards = [f"{shard}.tar" for shard in range(4)]
for shard in shards:
    with wds.TarWriter(shard) as tar:
        for i in range(8):
            tar.write({"__key__": f"{shard[0]}{i}", "txt": "text"})


def keys(dataset):
    return [sample["__key__"] for sample in dataset]


def different(orders):
    """-> how many different orders among these; each has to hold every sample once."""
    assert all(sorted(order) == sorted(orders[0]) and len(set(order)) == 32 for order in orders)
    return len({tuple(order) for order in orders})


def plain(**options):
    return wds.WebDataset(shards, **{"shardshuffle": False, **options})


samples = plain().shuffle(100, seed=1)
whole_shards = plain(shardshuffle=4, seed=1)
counting = plain().compose(wds.detshuffle(100, seed=1))
counts = {
    "shuffle(100, seed=1)": different([keys(samples) for _ in range(3)]),
    "shardshuffle=4, seed=1": different([keys(whole_shards) for _ in range(3)]),
    "detshuffle, a fresh copy per epoch": different([keys(copy.deepcopy(counting)) for _ in range(3)]),
    "detshuffle, one object": different([keys(counting) for _ in range(3)]),
    "shuffle(100, seed=epoch)": different([keys(plain().shuffle(100, seed=epoch)) for epoch in range(3)]),
}
assert keys(samples) != keys(plain()) != keys(whole_shards)  # they do shuffle
for what, count in counts.items():
    print(f"{what}: {count} different order(s) in 3 epochs")
if list(counts.values()) != [1, 1, 1, 3, 3]:
    sys.exit("no longer so: 1, 1, 1, 3, 3 different orders were seen")
PYTHON
