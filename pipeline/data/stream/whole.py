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
from data_prep.tar_header import BLOCK, parse_header
from pipeline.data.shards import DataError

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
            self._head += data[start : start + BLOCK - len(self._head)]
            if len(self._head) < BLOCK:
                break
            self._header(bytes(self._head))
            self._head.clear()
        self._position = end

    def _header(self, block: bytes) -> None:
        header = parse_header(block) if any(block) else None
        if self._ended or not any(block):
            if header is not None:
                raise self._fault(
                    f"zeros, which mark its end, stand before byte {self._next_header:,}, but more files follow: "
                    "write it again as one tar"
                )
            self._ended = True
            self._next_header += BLOCK
            return
        if header is None:
            behind = f" behind {self._name!r}" if self._name else ""
            what = "damaged header" if self._next_header else "no tar begins like this"
            raise self._fault(f"{what}{behind} at byte {self._next_header:,}: copy it again")
        if header.type not in b"xgLKX":
            self._name = header.name.decode("utf-8", "replace")
        if header.type in _LINKS:
            target = header.link.decode("utf-8", "replace")
            raise self._fault(
                f"{self._name!r} is a {_LINKS[header.type]} to {target!r}, which a stream cannot follow: write it "
                "again with `tar --hard-dereference --dereference`"
            )
        self._next_header += BLOCK + (0 if header.type in _NO_DATA else header.size + -header.size % BLOCK)

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
