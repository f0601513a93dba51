"""Stage 2 of a build: one shard, gathered from the data files of the chunks."""

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.manifest import ShardEntry, ShardIndex, index_path
from data_prep.storage import Folder, LostWorkError

JPEG_START = b"\xff\xd8"
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


def ustar_header(name: str, size_bytes: int) -> bytes:
    """The 512-byte tar header of a plain file, as `tarfile` makes it, in a tenth of the time. Owner, times and mode are
    fixed: the same input gives the same bytes.
    """
    header = bytearray(_EMPTY_HEADER)
    encoded = name.encode("ascii")
    header[: len(encoded)] = encoded
    header[124:135] = b"%011o" % size_bytes
    header[148:155] = b"%06o\0" % (_EMPTY_SUM + sum(encoded) + sum(header[124:135]))
    return bytes(header)


_EMPTY_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
# Of all but name and size; the checksum counts its own field as spaces.
_EMPTY_SUM = sum(_EMPTY_HEADER) - sum(_EMPTY_HEADER[124:135]) - sum(_EMPTY_HEADER[148:156]) + 8 * ord(" ")


def write_shard(task: ShardTask) -> ShardEntry:
    """Gather one shard from the chunks' data files; write it, its index, and the record that both are there."""
    keys: list[str] = []
    offsets: list[int] = []
    digest, at = hashlib.sha256(), 0
    with task.output.writing(task.name) as temp:
        with open(temp, "wb") as file:

            def add(name: str, data: bytes | memoryview) -> int:
                nonlocal at
                start = at + tarfile.BLOCKSIZE
                for part in (ustar_header(name, len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE)):
                    file.write(part)
                    digest.update(part)
                    at += len(part)
                return start

            for position, jpeg, tail in _gather(task):
                plain, _, described = tail.partition(b"\n")
                key = task.keys.get(position, plain.decode())
                label = int(task.label[position])
                keys.append(key)
                offsets.append(add(f"{key}.jpg", jpeg))
                add(f"{key}.json", f'{{"wnid": "{task.wnids[label]}", "label": {label}, '.encode() + described)
            end = bytes(2 * tarfile.BLOCKSIZE)
            end += bytes(-(at + len(end)) % tarfile.RECORDSIZE)
            file.write(end)
            digest.update(end)
        index = ShardIndex(np.array(keys), np.array(offsets), task.jpeg_bytes, task.label)
        # Before the shard gets its name: a shard is never without its index.
        task.output.write(str(index_path(task.name)), index.to_bytes())
        size_bytes = at + len(end)
    entry = ShardEntry(file=task.name, samples=len(keys), bytes=size_bytes, sha256=digest.hexdigest())
    task.work.write(f"shards/{task.name}.json", entry.model_dump_json().encode())
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
