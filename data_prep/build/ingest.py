"""Stage 1 of a build: one chunk of a source -> a data file with its usable images, and a row for every image.

The data file holds, for each usable image, its JPEG followed by its tail (sample key, newline, and what the sample's
JSON will say but for the label, which is known only when all classes are). Images lie in the order of their shuffle
hash, so that a shard, which is a range of these hashes, finds its share of each chunk in one piece.
"""

import hashlib
import heapq
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import IO, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.images.prepare import ImagePolicy, prepare_image
from data_prep.images.rejection import ImageRejected
from data_prep.ledger import SCHEMA
from data_prep.sources.items import Damage, Record, Stray
from data_prep.sources.layout import INTENDED
from data_prep.sources.reading import Chunk
from data_prep.storage import Folder

MAX_KEY_CHARS = 80  # leaves room for the extension in the 100 bytes of a plain tar header
BUFFER_BYTES = 192 << 20  # images of a chunk are held in memory up to here, then on local disk
VAL_SALT = "val"

# What stage 2 needs to know of each row, beside the ledger's columns.
ROW_SCHEMA = pa.schema(
    [
        *(field for field in SCHEMA if field.name not in ("key", "shard")),
        ("order", pa.uint64()),  # place in the shuffle
        ("name_hash", pa.uint64()),  # of class and name, whatever the seed: decides validation, limit, exclusion
        ("key_hash", pa.uint64()),  # of the key that the name gives: equal for names that collide
        ("content_hash", pa.uint64()),  # first 64 bits of sha256
        ("offset", pa.int64()),  # of the image in the data file; -1: it is not there
        ("tail_bytes", pa.int32()),
        ("plain_key", pa.string()),
    ]
)


@dataclass(frozen=True)
class IngestTask:
    """What a worker needs to ingest one chunk into `work`/chunks."""

    source: str  # which source: the split it is for
    chunk: Chunk
    policy: ImagePolicy
    seed: int
    max_images_per_class: int | None
    work: Folder

    @property
    def name(self) -> str:
        """Stem of the chunk's two files."""
        return chunk_name(self.source, self.chunk.number)

    def __str__(self) -> str:
        return self.chunk.label


@dataclass(frozen=True)
class ChunkResult:
    """Counts of one ingested chunk; `damage` says which parts of the archive cannot be read."""

    images: int
    rejected: int
    damage: tuple[str, ...]


def chunk_name(split: str, number: int) -> str:
    """`train-000012`: of the source for that split."""
    return f"{split}-{number:06d}"


def name_hash(salt: str, wnid: str, name: str) -> int:
    """64 uniform bits that depend only on the arguments: the source of every random choice in data prep."""
    text = "\0".join((salt, wnid, name))
    # surrogateescape: file names need not be valid UTF-8.
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def plain_key(wnid: str, name: str) -> str:
    """The sample key that a name gives; names that differ only in odd characters give the same."""
    # WebDataset takes everything after the first dot for the extension, and a slash for a folder.
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", os.path.splitext(name)[0])
    key = stem if stem.startswith(f"{wnid}_") else f"{wnid}_{stem}"
    return key if len(key) <= MAX_KEY_CHARS else hashed_key(key, wnid, name)


def hashed_key(key: str, wnid: str, name: str, attempt: int = 0) -> str:
    """A key that no other name gives, the same in every build."""
    suffix = f"-{name_hash(f'key{attempt}', wnid, name):016x}"
    return key[: MAX_KEY_CHARS - len(suffix)] + suffix


class Held:
    """What a chunk's data file will hold, until its order is known: as it came, then in a file on local disk."""

    def __init__(self) -> None:
        self._size = 0
        self._parts: dict[int, tuple[bytes, ...]] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, *parts: bytes) -> int:
        """Keep them, one after another; returns the offset where they begin."""
        offset, size = self._size, sum(map(len, parts))
        self._size += size
        if self._size > BUFFER_BYTES:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this
            self._file.seek(offset)
            self._file.writelines(parts)
        else:
            self._parts[offset] = parts
        return offset

    def parts(self, offset: int, size: int) -> tuple[bytes, ...]:
        """The `size` bytes that begin at an offset that `add` gave."""
        if offset in self._parts:
            return self._parts[offset]
        assert self._file is not None
        self._file.seek(offset)
        return (self._file.read(size),)


def ingest_chunk(task: IngestTask) -> ChunkResult:
    """Prepare every image of the chunk; write NAME.data, then NAME.parquet, which says that the chunk is done."""
    rows: list[dict[str, Any]] = []
    with Held() as held:
        for item, wanted in _within_limit(task):
            if isinstance(item, Record):
                rows.append(_ingest_image(item, wanted, task, held))
            else:
                rows.append(_row_of_other(item))
        usable = sorted((row for row in rows if row["offset"] >= 0), key=lambda row: (row["order"], row["plain_key"]))
        chunks = task.work.folder("chunks")
        at = 0
        with chunks.writing(f"{task.name}.data") as temp, open(temp, "wb") as file:
            for row in usable:
                parts = held.parts(row["offset"], row["bytes_out"] + row["tail_bytes"])
                row["offset"] = at
                file.writelines(parts)
                at += row["bytes_out"] + row["tail_bytes"]
    table = pa.Table.from_pylist(rows, schema=ROW_SCHEMA)
    with chunks.writing(f"{task.name}.parquet") as temp:
        pq.write_table(table, temp, compression="zstd")
    return ChunkResult(
        images=sum(row["sha256"] is not None for row in rows),
        rejected=sum(row["action"] == "rejected" for row in rows),
        damage=tuple(f"{row['name']}: {row['detail']}" for row in rows if row["reason"] == "damaged_archive"),
    )


def _within_limit(task: IngestTask) -> Iterator[tuple[Record | Stray | Damage, bool]]:
    """Items with whether they are wanted: at most `max_images_per_class` training images of a class.

    A class may lie in several chunks; stage 2 makes the final choice, by the same hash. Rejected images are counted
    before they are decoded, and not replaced.
    """
    if task.max_images_per_class is None:
        yield from ((item, True) for item in task.chunk.items())
        return
    for key, group in groupby(task.chunk.items(), key=lambda item: isinstance(item, Record) and item.split + item.wnid):
        if not key or key.startswith("val"):
            yield from ((item, True) for item in group)
            continue
        # A heap of the smallest hashes needs the largest on top: hence the minus; position settles ties.
        kept: list[tuple[int, int, Record]] = []
        for position, item in enumerate(group):
            assert isinstance(item, Record)
            entry = (-name_hash(VAL_SALT, item.wnid, _text(item.name)), -position, item)
            if len(kept) < task.max_images_per_class:
                heapq.heappush(kept, entry)
            else:
                yield heapq.heappushpop(kept, entry)[2], False
        yield from ((item, True) for _, _, item in sorted(kept, key=lambda entry: -entry[1]))


def _text(name: str) -> str:
    # File names need not be valid UTF-8; what is written and hashed is.
    return name.encode("utf-8", "backslashreplace").decode()


def _row(split: str, wnid: str, name: str, action: str, **more: Any) -> dict[str, Any]:
    absent: dict[str, Any] = dict.fromkeys(ROW_SCHEMA.names)
    zeros: dict[str, Any] = dict.fromkeys(("order", "name_hash", "key_hash", "content_hash", "tail_bytes"), 0)
    zeros["offset"] = -1
    texts = {"reason": "", "detail": "", "plain_key": ""}
    return {**absent, **zeros, **texts, "split": split, "wnid": wnid, "name": name, "action": action, **more}


def _row_of_other(item: Stray | Damage) -> dict[str, Any]:
    if isinstance(item, Damage):
        return _row(item.split, "", _text(item.where), "rejected", reason="damaged_archive", detail=_text(item.detail))
    action = "skipped" if item.reason in INTENDED else "rejected"
    return _row(item.split, "", _text(item.name), action, reason=item.reason, bytes_in=item.bytes)


def _ingest_image(record: Record, wanted: bool, task: IngestTask, held: Held) -> dict[str, Any]:
    name = _text(record.name)
    digest = hashlib.sha256(record.data)
    row = _row(
        record.split,
        record.wnid,
        name,
        "skipped",
        bytes_in=len(record.data),
        sha256=digest.hexdigest(),
        content_hash=int.from_bytes(digest.digest()[:8], "big"),
        name_hash=name_hash(VAL_SALT, record.wnid, name),
    )
    if not wanted:
        return {**row, "reason": "over_class_limit"}
    try:
        image = prepare_image(record.data, task.policy)
    except ImageRejected as error:
        sizes = {"source_width": error.width, "source_height": error.height}
        return {**row, **sizes, "action": "rejected", "reason": error.reason, "detail": _text(error.detail)}
    key = plain_key(record.wnid, name)
    described = {
        "source_name": name,
        "width": image.width,
        "height": image.height,
        "bytes": len(image.jpeg),
        "source_width": image.source_width,
        "source_height": image.source_height,
        "reencoded": image.reencoded,
    }
    tail = f"{key}\n{json.dumps(described)[1:]}".encode()
    offset = held.add(image.jpeg, tail)
    return {
        **row,
        "action": "repaired" if image.repairs else "kept",
        "reason": "+".join(image.repairs),
        "width": image.width,
        "height": image.height,
        "source_width": image.source_width,
        "source_height": image.source_height,
        "bytes_out": len(image.jpeg),
        "order": name_hash(f"order{task.seed}", record.wnid, name),
        "key_hash": name_hash("key", "", key),
        "offset": offset,
        "tail_bytes": len(tail),
        "plain_key": key,
    }
