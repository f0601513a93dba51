"""Six shards that stand behind a URL, a read of one, and what the read-ahead is about."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from data_prep.manifest import ShardEntry
from pipeline.data.remote import RemoteShards
from pipeline.data.shard_cache import Download
from tests.support.processes import wait_for

SHARD_BYTES = 100_000
CONTENTS = [np.random.default_rng(number).bytes(SHARD_BYTES) for number in range(6)]
ENTRIES = [
    ShardEntry(file=f"train-{number:06d}.tar", samples=1, bytes=SHARD_BYTES, sha256=f"{number:064x}")
    for number in range(len(CONTENTS))
]


def looks_of(shards: RemoteShards) -> list[list[int]]:
    """A list that grows with each look of the read-ahead at its folder: for which shards it looked."""
    looks: list[list[int]] = []
    claim = shards._whole.claim

    def noted(listed: Sequence[int], skipped: Collection[int]) -> Download | None:
        looks.append(list(listed))
        return claim(listed, skipped)

    shards._whole.claim = noted  # type: ignore[method-assign]
    return looks


def look_again(looks: list[list[int]], times: int = 3) -> None:
    """Until the read-ahead has looked so often from now on, the first of it perhaps in part before."""
    seen = len(looks)
    wait_for(lambda: len(looks) > seen + times)


def piece(shards: RemoteShards, shard: int, offset: int = 777, size: int = 5000) -> None:
    assert shards.read(shard, offset, size) == CONTENTS[shard][offset : offset + size]
