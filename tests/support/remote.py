"""Six shards that stand behind a URL, and a read of one."""

from __future__ import annotations

import numpy as np

from data_prep.manifest import ShardEntry
from pipeline.data.remote import RemoteShards

SHARD_BYTES = 100_000
CONTENTS = [np.random.default_rng(number).bytes(SHARD_BYTES) for number in range(6)]
ENTRIES = [
    ShardEntry(file=f"train-{number:06d}.tar", samples=1, bytes=SHARD_BYTES, sha256=f"{number:064x}")
    for number in range(len(CONTENTS))
]


def piece(shards: RemoteShards, shard: int, offset: int = 777, size: int = 5000) -> None:
    assert shards.read(shard, offset, size) == CONTENTS[shard][offset : offset + size]
