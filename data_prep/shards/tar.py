"""The tar of a shard, byte by byte: `KEY.jpg`, `KEY.cls` (the class number as text), `KEY.json` of each sample, next to
each other and in this order. Written by a build, read and completed by `upgrade.py`.

Sets of format 1 have no `KEY.cls`; but for that their tars are the same.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_prep.manifest import ShardEntry, ShardIndex
from data_prep.storage import DataPrepError

BLOCK = tarfile.BLOCKSIZE
CLASS_BYTES = 2 * BLOCK  # what a `KEY.cls` takes: its header, and a number of few digits
_EMPTY_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
# Of all but name and size; the checksum counts its own field as spaces.
_EMPTY_SUM = sum(_EMPTY_HEADER) - sum(_EMPTY_HEADER[124:135]) - sum(_EMPTY_HEADER[148:156]) + 8 * ord(" ")


class ShardTarError(DataPrepError):
    """A shard is not as `shard` wrote it."""


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


class MemberTar:
    """Writes members into a tar, `file` (None: only counts and hashes)."""

    def __init__(self, file: BinaryIO | None):
        self.file = file
        self.bytes, self.digest = 0, hashlib.sha256()

    def add_member(self, name: str, data: bytes | memoryview) -> int:
        """Where the data of the member begins."""
        start = self.bytes + BLOCK
        for part in (ustar_header(name, len(data)), data, bytes(-len(data) % BLOCK)):
            self._put(part)
        return start

    def _put(self, part: bytes | memoryview) -> None:
        if self.file is not None:
            self.file.write(part)
        self.digest.update(part)
        self.bytes += len(part)

    def finish(self) -> None:
        """The end of the tar; call once."""
        self._put(bytes(2 * BLOCK))
        self._put(bytes(-self.bytes % tarfile.RECORDSIZE))


class ShardTar(MemberTar):
    """Writes a shard of classified images, and notes what its index and entry say.

    with_classes False: as format 1 had it, without `KEY.cls`.
    """

    def __init__(self, file: BinaryIO | None, *, with_classes: bool = True):
        super().__init__(file)
        self.with_classes = with_classes
        self.keys: list[str] = []
        self._rows: list[tuple[int, int, int]] = []  # offset, size, label

    def add(self, key: str, jpeg: bytes | memoryview, label: int, described: bytes) -> None:
        """A sample; `described`: the text of its JSON."""
        self.keys.append(key)
        self._rows.append((self.add_member(f"{key}.jpg", jpeg), len(jpeg), label))
        if self.with_classes:
            self.add_member(f"{key}.cls", b"%d" % label)
        self.add_member(f"{key}.json", described)

    def entry(self, name: str) -> ShardEntry:
        """What the manifest says of the shard, once it is finished."""
        return ShardEntry(file=name, samples=len(self.keys), bytes=self.bytes, sha256=self.digest.hexdigest())

    def index(self) -> ShardIndex:
        """What lies beside the shard."""
        rows = np.array(self._rows, np.int64).reshape(-1, 3)
        return ShardIndex(np.array(self.keys), rows[:, 0], rows[:, 1], rows[:, 2])


class Sample(NamedTuple):
    """A sample of a shard; `label` is the number in its `KEY.cls`, None where it has none."""

    key: str
    jpeg: bytes
    label: int | None
    described: bytes


class ShardTarReader:
    """Iterate it for the samples of a shard, in one pass; `digest` is then that of the whole file.

    Raises ShardTarError, with the shard's name, where a byte of a header is not as `ShardTar` writes it.
    """

    def __init__(self, file: BinaryIO, where: str):
        self.file, self.where = file, where
        self.bytes, self.digest = 0, hashlib.sha256()

    def __iter__(self) -> Iterator[Sample]:
        member = self._member()
        while member is not None:
            name, jpeg = member
            key, label = name.removesuffix(".jpg"), None
            if name == key:
                raise self.fault(f"{name} stands where an image should")
            member = self._member()
            if member is not None and member[0] == f"{key}.cls":
                if not member[1].isdigit():
                    raise self.fault(f"{member[0]} is no class number")
                label = int(member[1])
                member = self._member()
            if member is None or member[0] != f"{key}.json":
                raise self.fault(f"{key} has no JSON after it")
            yield Sample(key, jpeg, label, member[1])
            member = self._member()

    def fault(self, text: str) -> ShardTarError:
        """An error that names the shard."""
        return ShardTarError(f"{self.where} is not as `shard` wrote it: {text}; `python -m data_prep verify` lists all")

    def _read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.bytes += len(data)
        if len(data) < size:
            raise self.fault(f"it ends at byte {self.bytes}")
        return data

    def _member(self) -> tuple[str, bytes] | None:
        at, header = self.bytes, self._read(BLOCK)
        if not header.strip(b"\0"):
            while data := self.file.read(1 << 20):
                self.digest.update(data)
                if data.strip(b"\0"):
                    raise self.fault(f"data behind its end mark at byte {at}")
                self.bytes += len(data)
            return None
        name, digits = header[:100].split(b"\0", 1)[0], header[124:135]
        if not (name.isascii() and digits.isdigit()) or header != ustar_header(name.decode(), int(digits, 8)):
            raise self.fault(f"a damaged tar header at byte {at}")
        size = int(digits, 8)
        data = self._read(size)
        self._read(-size % BLOCK)
        return name.decode(), data


def class_of(described: bytes) -> tuple[int, str]:
    """(label, WordNet id) in the JSON of a sample. Raises ValueError where it has not both."""
    told: Any = json.loads(described)
    if not isinstance(told, dict) or type(told.get("label")) is not int or not isinstance(told.get("wnid"), str):
        raise ValueError("its JSON does not say which class it has")
    return told["label"], told["wnid"]
