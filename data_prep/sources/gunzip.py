"""The content of a gzip file, front to back, and places in it from which reading can begin again.

zlib-ng inflates JPEGs a quarter faster than zlib and checks them twice as fast (tests/bench/RESULTS.md has isal and
rapidgzip, too). Headers and checksums of the members are read here: what was inflated is given before its checksum is
found to be wrong, and reading can begin inside a member, where no library checks anything.
"""

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from data_prep.sources.deflate import WINDOW_BYTES, find_block, inflater_at
from data_prep.sources.streams import LOCAL_BUFFER_BYTES, FileRange

try:
    from zlib_ng import zlib_ng as fast
except ImportError:  # a platform for which there is no wheel
    fast: Any = zlib  # type: ignore[no-redef]
Error: type[Exception] = getattr(fast, "error")  # noqa: B009 - its stub calls it an instance

# An inflater gives nothing for the input block that it fails on, so a small one loses little.
COMPRESSED_BLOCK_BYTES = 1 << 16
INFLATED_BLOCK_BYTES = 1 << 19
MAGIC = b"\x1f\x8b"
HAS_CHECKSUM, HAS_EXTRA, HAS_NAME, HAS_COMMENT = 2, 4, 8, 16  # flags of a header (RFC 1952)
TRAILER_BYTES = 8  # CRC-32 and size of the content

# Between places where reading may begin again. Finding one takes some 30 ms, keeping it 44 kB.
PLACE_EVERY_BYTES = 1 << 30
# Blocks of input to look into, where a coder's blocks are longer than those.
LOOKED_INTO = 64


class Place(NamedTuple):
    """Where a block of the compressed data begins. bit: in the file; position: in the content; window: the content
    before it, 32 KiB; crc, size: of the member's content so far.
    """

    bit: int
    position: int
    window: bytes
    crc: int
    size: int


def _decompress(inflate: Any, data: bytes | memoryview) -> bytes:
    try:
        # Zeros inflate a thousandfold: hence the bound.
        return inflate.decompress(data, INFLATED_BLOCK_BYTES)
    except Error as error:
        raise OSError(error) from None


class Gunzip:
    """Iterate it for the content, in blocks of some 64 KiB. Raises EOFError or OSError where the data is damaged.

    start: a place that an earlier reading has found; place: the one found last.
    """

    def __init__(self, file: FileRange, start: Place | None = None):
        self.place: Place | None = None
        self._file = file
        self._ahead = memoryview(b"")  # read from the file, behind `_data`
        self._data: bytes | memoryview = b""  # what is inflated next
        self._position = start.position if start else 0
        self._next_place = self._position + PLACE_EVERY_BYTES
        self._looked_into = 0
        self._before = b""  # the content before `_data`, at least a window of it, where a place is looked for
        self._start = start
        if start:
            file.move(start.bit // 8)

    @property
    def source_position(self) -> int:
        """Bytes of the file that were inflated."""
        return self._file.position - len(self._ahead) - len(self._data)

    def __iter__(self) -> Iterator[bytes]:
        start = self._start
        if start:
            first = self._file.read(1)
            inflate = inflater_at(fast, first, start.bit % 8, start.window)
            yield from self._member(inflate, start.crc, start.size)
        first_member = start is None
        while self._header(first_member):
            first_member = False
            yield from self._member(fast.decompressobj(-zlib.MAX_WBITS), 0, 0)

    def _fill(self) -> bool:
        """Have some data at hand; False at the end."""
        if not self._data:
            if not self._ahead:  # by as much as a file's buffer holds, which is passed by then
                self._ahead = memoryview(self._file.read(LOCAL_BUFFER_BYTES))
            self._data, self._ahead = self._ahead[:COMPRESSED_BLOCK_BYTES], self._ahead[COMPRESSED_BLOCK_BYTES:]
        return bool(self._data)

    def _take(self, size: int) -> bytes:
        taken = b""
        while len(taken) < size and self._fill():
            missing = size - len(taken)
            taken, self._data = taken + bytes(self._data[:missing]), self._data[missing:]
        return taken

    def _take_text(self) -> None:
        while (byte := self._take(1)) != b"\0":
            if not byte:
                raise EOFError("the end is missing")

    def _header(self, first: bool) -> bool:
        """Pass over a member's header; False where there is none: what follows the last member is not ours."""
        if not first:
            while self._fill() and not (rest := bytes(self._data).lstrip(b"\0")):
                self._data = rest
            self._data = bytes(self._data).lstrip(b"\0")
        start = self._take(10)
        if not start.startswith(MAGIC[: len(start)]) or (not start and not first) or self._file.error:
            return False
        if len(start) < 10:
            raise EOFError("the end is missing")
        if start[2] != 8:
            raise OSError(f"unknown compression method {start[2]}")
        flags = start[3]
        if flags & HAS_EXTRA:
            self._take(int.from_bytes(self._take(2), "little"))
        for flag in (HAS_NAME, HAS_COMMENT):
            if flags & flag:
                self._take_text()
        if flags & HAS_CHECKSUM:
            self._take(2)
        return True

    def _member(self, inflate: Any, crc: int, size: int) -> Iterator[bytes]:
        while not inflate.eof:
            if not self._fill():
                if self._file.error:
                    return
                out = inflate.flush()
                crc, size = fast.crc32(out, crc), size + len(out)
                self._position += len(out)
                yield out
                if not inflate.eof:
                    raise EOFError("the end is missing")
                break
            data, looking = self._data, self._position >= self._next_place - 2 * WINDOW_BYTES
            begun, end = (crc, size, self._position), self._file.position - len(self._ahead)
            parts = []
            while self._data and not inflate.eof:
                out = _decompress(inflate, self._data)
                self._data = inflate.unconsumed_tail
                crc, size = fast.crc32(out, crc), size + len(out)
                self._position += len(out)
                if looking:
                    parts.append(out)
                yield out
            if inflate.eof:
                self._data = inflate.unused_data
            elif looking:
                self._look(bytes(data), b"".join(parts), end, begun)
        self._before = b""
        trailer = self._take(TRAILER_BYTES)
        if self._file.error:
            return
        if len(trailer) < TRAILER_BYTES:
            raise EOFError("the end is missing")
        if int.from_bytes(trailer[:4], "little") != crc:
            raise OSError("incorrect data check")
        if int.from_bytes(trailer[4:], "little") != size & 0xFFFFFFFF:
            raise OSError("incorrect length check")

    def _look(self, data: bytes, content: bytes, end: int, begun: tuple[int, int, int]) -> None:
        """Look for a place in a block of input that ends at byte `end` of the file and gave `content`."""
        before, self._before = self._before, (self._before + content)[-WINDOW_BYTES:]
        if self._position < self._next_place or len(before) < WINDOW_BYTES:
            return
        crc, size, position = begun
        found = find_block(fast, data, before, content)
        self._looked_into += 1
        if found is not None:
            bit, at = found
            window = (before + content[:at])[-WINDOW_BYTES:]
            crc, size = fast.crc32(content[:at], crc), (size + at) & 0xFFFFFFFF
            self.place = Place(8 * (end - len(data)) + bit, position + at, window, crc, size)
        if found is not None or self._looked_into >= LOOKED_INTO:
            self._next_place, self._looked_into, self._before = self._position + PLACE_EVERY_BYTES, 0, b""
