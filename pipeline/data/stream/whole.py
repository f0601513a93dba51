"""Whether a tar that is read as a stream is whole, told from the bytes that pass.

webdataset 1.0.2 and the tarfile of Python under it end without a word at a header that is damaged, at one that is cut,
and where a tar is cut between two members: what comes behind is lost, and no sample is missed by them. They pass links
over, too, which is how GNU tar writes a file that it has met before.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, cast

from data_prep.credentials import without_credentials
from pipeline.data.shards import DataError

_BLOCK = 512
_GZIP = b"\x1f\x8b"
_LINKS = {b"1": "hard link", b"2": "symbolic link"}
_NO_DATA = b"123456"  # kinds whose size says nothing: some programs give folders one
_READ_BYTES = 1 << 20


class WholeTar:
    """A stream that passes bytes on, and follows the headers in them. Gzipped ones are unpacked on the way.

    Raises DataError, in which the shard is named, from `read` for what is no tar or holds links, and from `finish`,
    which is called when tarfile has had enough, for what ends early.
    """

    def __init__(self, stream: BinaryIO, url: str) -> None:
        self.url = url
        self._stream = stream
        self._source: Any = None
        self._position, self._next_header = 0, 0
        self._head = bytearray()  # of a header that two reads share
        self._name = ""
        self._ended = False
        self._begun = False

    def read(self, size: int = -1) -> bytes:
        """As a file's. tarfile asks for blocks."""
        try:
            if not self._begun:
                self._begin()
            data = _read_fully(self._source, size)
        except (OSError, EOFError) as error:  # a command that failed, a gzip that is cut
            raise self._fault(" ".join(str(error).split()) or type(error).__name__) from None
        self._follow(data)
        return data

    def _begin(self) -> None:
        begin = _read_fully(self._stream, len(_GZIP))
        if not begin:
            raise self._fault("it is empty, or nothing answers there: look at its URL, then copy it again")
        self._source = _Joined(begin, self._stream)
        if begin == _GZIP:
            self._source = gzip.GzipFile(fileobj=cast(BinaryIO, self._source))
        self._begun = True

    def finish(self) -> None:
        """Read to the end, and check that it is one."""
        while self.read(_READ_BYTES):
            pass
        if not self._ended:
            at = f"in or behind {self._name!r}, at byte {self._position:,}" if self._name else "before its first file"
            raise self._fault(f"it ends early, {at}: no mark of a tar's end: copy it again")

    def close(self) -> None:
        """Let go of it, also in the middle: what the command behind it says of that is its own affair."""
        with suppress(OSError):
            self._stream.close()

    def _follow(self, data: bytes) -> None:
        end = self._position + len(data)
        while self._next_header < end:
            start = max(0, self._next_header + len(self._head) - self._position)
            self._head += data[start : start + _BLOCK - len(self._head)]
            if len(self._head) < _BLOCK:
                break
            self._header(bytes(self._head))
            self._head.clear()
        self._position = end

    def _header(self, block: bytes) -> None:
        if self._ended or not any(block):
            if any(block) and _size(block[124:136]) is not None and _checksum(block) == _number(block[148:156]):
                raise self._fault(
                    f"zeros, which mark its end, stand before byte {self._next_header:,}, but more files follow: "
                    "write it again as one tar"
                )
            self._ended = True
            self._next_header += _BLOCK
            return
        size = _size(block[124:136])
        if size is None or _checksum(block) != _number(block[148:156]):
            behind = f" behind {self._name!r}" if self._name else ""
            what = "damaged header" if self._next_header else "no tar begins like this"
            raise self._fault(f"{what}{behind} at byte {self._next_header:,}: copy it again")
        kind = block[156:157]
        if kind not in b"xgLKX":
            self._name = block[:100].rstrip(b"\0").decode("utf-8", "replace")
        if kind in _LINKS:
            target = block[157:257].rstrip(b"\0").decode("utf-8", "replace")
            raise self._fault(
                f"{self._name!r} is a {_LINKS[kind]} to {target!r}, which a stream cannot follow: write the tar again "
                "with `tar --hard-dereference --dereference`"
            )
        self._next_header += _BLOCK + (0 if kind in _NO_DATA else size + -size % _BLOCK)

    def _fault(self, text: str) -> DataError:
        return DataError(f"shard {without_credentials(self.url)}: {without_credentials(text)}")


class _Joined:
    """Two bytes that were read already, then the rest of a stream."""

    def __init__(self, begin: bytes, stream: BinaryIO) -> None:
        self._begin, self._read = begin, cast(Callable[[int], bytes], stream.read)

    def read(self, size: int = -1) -> bytes:
        begin, self._begin = self._begin, b""
        return begin + self._read(size - len(begin) if size >= 0 else size)


def _read_fully(source: Any, size: int) -> bytes:
    """Pipes may give less than they are asked for before they end."""
    data = bytes(source.read(size)) if size else b""
    while 0 < len(data) < size and (more := source.read(size - len(data))):
        data += more
    return data


def _number(field: bytes) -> int | None:
    text = field.split(b"\0", 1)[0].strip(b" \0")
    try:
        return int(text or b"0", 8)
    except ValueError:
        return None


def _size(field: bytes) -> int | None:
    if field[0] in (0x80, 0xFF):  # GNU's binary number, for 8 GB and more
        return int.from_bytes(field[1:], "big")
    return _number(field)


def _checksum(block: bytes) -> int:
    return sum(block) - sum(block[148:156]) + 8 * ord(" ")
