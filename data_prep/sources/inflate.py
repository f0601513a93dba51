"""Compressed files as readers: gzip, bzip2, xz."""

import bz2
import lzma
from collections.abc import Iterator
from typing import Any

from data_prep.sources.gunzip import INFLATED_BLOCK_BYTES, Gunzip, Place
from data_prep.sources.streams import FileRange, Reader

MAGIC = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0"}
LARGE_BLOCK_BYTES = 16 << 20


class Inflated(Reader):
    """The content of a compressed file, from its beginning or, of gzip, from a place that an earlier reading has found.

    `position` counts inflated bytes, `source.position` compressed ones. No thread reads ahead: handing over what it
    inflates, and waiting for Python's lock, cost half as much as inflating.
    """

    def __init__(self, source: FileRange, compression: str, start: Place | None = None):
        self.source = source
        self._gunzip = Gunzip(source, start) if compression == "gzip" else None
        self._blocks = iter(self._gunzip) if self._gunzip else _decompress(source, compression)
        self._block, self._at = b"", 0
        self._ended = False
        self.position = start.position if start else 0
        # glibc gives blocks as large as an image back to the system at once, and takes them anew, a fault a page: a
        # fifth of the time of reading. That a much larger one was freed raises its threshold.
        bytearray(LARGE_BLOCK_BYTES)

    @property
    def place(self) -> Place | None:
        """Where reading may begin again: the place found last, of a gzip file."""
        return self._gunzip.place if self._gunzip else None

    def _next(self) -> bool:
        """Have another block at hand, all of it unread; False at the end."""
        while not self._ended:
            try:
                block = next(self._blocks, None)
            except (EOFError, OSError, lzma.LZMAError) as error:
                self._ended = True
                at = self._gunzip.source_position if self._gunzip else self.source.position
                self.error = f"compressed data is broken or cut short near byte {at}: {error}"
                break
            if block is None:
                self._ended = True
                self.error = self.source.error
            elif block:
                self._block, self._at = block, 0
                return True
        self._block, self._at = b"", 0
        return False

    def read(self, size: int) -> bytes:
        start = self._at
        stop = start + size
        if stop <= len(self._block):
            self._at = stop
            self.position += size
            return self._block[start:stop]
        # Views, so that what spans blocks is copied once.
        parts = [memoryview(self._block)[start:]]
        missing = stop - len(self._block)
        while missing > 0 and self._next():
            self._at = min(missing, len(self._block))
            parts.append(memoryview(self._block)[: self._at])
            missing -= self._at
        self.position += size - missing
        return b"".join(parts)

    def skip(self, size: int) -> int:
        missing = size
        while missing > len(self._block) - self._at:
            missing -= len(self._block) - self._at
            if not self._next():
                break
        else:
            self._at += missing
            missing = 0
        self.position += size - missing
        return size - missing

    def unread(self, data: bytes) -> None:
        self._block, self._at = data + self._block[self._at :], 0
        self.position -= len(data)

    def close(self) -> None:
        self.source.close()


def compression_of(path: str) -> str | None:
    """gzip, bzip2 or xz by the first bytes of the file; None for another."""
    with FileRange(path, jumping=True) as file:
        start = file.read(8)
    return next((name for name, magic in MAGIC.items() if start.startswith(magic)), None)


def open_reader(
    path: str, compression: str | None, *, jumping: bool = False, start: Place | None = None
) -> FileRange | Inflated:
    """A reader of the whole content of a file, or of what comes from `start` on."""
    file = FileRange(path, jumping=jumping)
    return file if compression is None else Inflated(file, compression, start)


def _decompress(file: FileRange, compression: str) -> Iterator[bytes]:
    opener: Any = {"bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}[compression]
    with opener(file) as content:
        while data := content.read1(INFLATED_BLOCK_BYTES):
            yield data
