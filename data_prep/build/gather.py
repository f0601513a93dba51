"""Stage 2 of a build: one shard, gathered from the data files of the chunks."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.manifest import ShardEntry, index_path
from data_prep.shards.tar import ShardTar
from data_prep.storage import Folder, LostWorkError

JPEG_START = b"\xff\xd8"
FORMER_RECORDS, SHARD_RECORDS = "shards", "shards-2"  # in the unfinished work: of finished shards of format 1, and 2
GATHER_BYTES = 32 << 20  # of images in memory while a shard is written


@dataclass(frozen=True, eq=False)
class ShardTask:
    """One shard: where its samples lie in the chunks' data files, in the shard's order."""

    name: str
    output: Folder
    work: Folder
    chunks: list[str]  # names of the chunks that `chunk` points into
    chunk: np.ndarray
    offset: np.ndarray
    jpeg_bytes: np.ndarray
    tail_bytes: np.ndarray
    label: np.ndarray
    wnids: list[str]  # by label
    keys: dict[int, str]  # position -> key, where it is not the plain one

    def __str__(self) -> str:
        return self.name


def write_shard(task: ShardTask) -> ShardEntry:
    """Gather one shard from the chunks' data files; write it, its index, and the record that both are there."""
    with task.output.writing(task.name) as temp:
        with open(temp, "wb") as file:
            tar = ShardTar(file)
            for position, jpeg, tail in _gather(task):
                plain, _, described = tail.partition(b"\n")
                key, label = task.keys.get(position, plain.decode()), int(task.label[position])
                told = f'{{"wnid": "{task.wnids[label]}", "label": {label}, '.encode()
                tar.add(key, jpeg, label, told + described)
            tar.finish()
        # Before the shard gets its name: a shard is never without its index.
        task.output.write(str(index_path(task.name)), tar.index().to_bytes())
    entry = tar.entry(task.name)
    task.work.write(f"{SHARD_RECORDS}/{task.name}.json", entry.model_dump_json().encode())
    return entry


def _gather(task: ShardTask) -> Iterator[tuple[int, memoryview, bytes]]:
    """(position, JPEG, tail) of each sample, in order, at most GATHER_BYTES of them in memory."""
    sizes = task.jpeg_bytes.astype(np.int64) + task.tail_bytes
    group = np.cumsum(sizes) // GATHER_BYTES
    data = task.work.folder("chunks")
    for number in np.unique(group):
        positions = np.flatnonzero(group == number)
        # Neighbours in a data file are fetched in one read.
        positions_on_disk = positions[np.lexsort((task.offset[positions], task.chunk[positions]))]
        ranges: list[tuple[str, int, int]] = []
        for i in positions_on_disk.tolist():
            name, start, stop = (
                f"{task.chunks[task.chunk[i]]}.data",
                int(task.offset[i]),
                int(task.offset[i] + sizes[i]),
            )
            if ranges and ranges[-1][0] == name and ranges[-1][2] == start:
                ranges[-1] = (name, ranges[-1][1], stop)
            else:
                ranges.append((name, start, stop))
        try:
            joined = memoryview(b"".join(data.read_ranges(ranges)))
        except FileNotFoundError as error:
            raise LostWorkError(f"unfinished work is gone ({error}): give --force to begin anew") from None
        ends = np.cumsum(sizes[positions_on_disk])
        end_of = dict(zip(positions_on_disk.tolist(), ends.tolist(), strict=True))
        for i in positions.tolist():
            sample = joined[end_of[i] - int(sizes[i]) : end_of[i]]
            if sample[:2] != JPEG_START:
                raise LostWorkError(
                    f"{data.join(task.chunks[task.chunk[i]])}.data does not hold the image it should at byte "
                    f"{task.offset[i]}: give --force to begin anew"
                )
            yield i, sample[: int(task.jpeg_bytes[i])], bytes(sample[int(task.jpeg_bytes[i]) :])
