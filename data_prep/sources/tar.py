"""A tar reader for archives of terabytes, some of them damaged.

Python's tarfile takes a damaged header for the end of the archive, keeps every member in memory, and spends more time
on a header than a disk on the image behind it. This one reads forward, holds one member, and after damage goes on at
the next header that it finds. It reads what GNU tar, bsdtar and tarfile write: v7, ustar, GNU and pax headers.
"""

import posixpath
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_prep.sources.streams import Reader
from data_prep.tar_header import BLOCK, Header, parse_header, parse_pax

ZEROS = bytes(BLOCK)
SCAN_BYTES = 1 << 20
MAX_EXTENSION_BYTES = 1 << 20  # of a long name or a pax header: what claims more is damaged
FILE_TYPES = b"0\x007"
# Types whose size field says nothing of data: devices, fifos and folders, with what we call them.
BARE_TYPES = {b"1": "link", b"2": "link", b"3": "other", b"4": "other", b"5": "folder", b"6": "other"}
NAME_TYPES = b"LKxXgN"
OTHER_TYPES = b"DMSVA"
KNOWN_TYPES = frozenset(FILE_TYPES + b"".join(BARE_TYPES) + NAME_TYPES + OTHER_TYPES)
MAGIC_OFFSET = 257
_CHECKSUM_FIELD = re.compile(rb"[ 0]*[0-7]{1,6}[\0 ]")


class Member(NamedTuple):
    """One member. kind: file, link, folder or other; offset: of its first header; data_offset, size: of its data;
    target: of a link, the name that its file has in this tar, if it is there.
    """

    name: str
    kind: str
    offset: int
    data_offset: int
    size: int
    target: str = ""


class Gap(NamedTuple):
    """Bytes [start, stop) that cannot be read; cut: the archive ends in there, too early."""

    start: int
    stop: int
    detail: str
    cut: bool = False

    def __str__(self) -> str:
        return f"bytes {self.start} to {self.stop} cannot be read: {self.detail}"


def _target(name: str, link: bytes, *, symbolic: bool) -> str:
    """A hard link names a member, a symbolic one a path from its own folder."""
    target = link.decode("utf-8", "surrogateescape")
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target)) if symbolic else target


class Tar:
    """Iterate it for the members and gaps of a tar, in order; after a member, `data()` may be called once.

    salvage: there is no header where the reader stands, begin by searching for one; resume_at: after damage go on only
    at a regular file with such a name; max_scan_bytes: how far to search for a header.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        salvage: bool = False,
        resume_at: Callable[[str], bool] | None = None,
        max_scan_bytes: int | None = None,
    ):
        self.reader = reader
        self._salvage = salvage
        self._resume_at = resume_at
        self._max_scan_bytes = max_scan_bytes
        self._size = 0
        self._passed_over = False
        self.end_marked = False  # once iterated: zeros said that the tar ends there

    def data(self) -> bytes | None:
        """The data of the member given last, or None where the archive ends before theirs."""
        data = self.reader.read(self._size)
        return data if len(data) == self._size else None

    def __iter__(self) -> Iterator[Member | Gap]:
        reader = self.reader
        if self._salvage and not self._find_header():
            return
        start: int | None = None  # first header of the member at hand: names and pax headers stand before its own
        long_name: bytes | None = None
        long_link: bytes | None = None
        pax: dict[bytes, bytes] | None = {}
        while True:
            at = reader.position
            begun = start is not None
            start = at if start is None else start
            block = reader.read(BLOCK)
            header = parse_header(block) if len(block) == BLOCK else None
            if header is None or (header.type in NAME_TYPES and header.size > MAX_EXTENSION_BYTES):
                ended, gap = self._after_bad_block(start, block, begun)
                if gap is not None:
                    yield gap
                if ended:
                    return
                start, long_name, long_link, pax = None, None, None, {}
                continue
            if header.type in NAME_TYPES:
                body = reader.read(header.size)
                if len(body) < header.size:
                    yield Gap(start, reader.position, "the archive ends inside a header", cut=True)
                    return
                reader.read(-header.size % BLOCK)
                if header.type == b"L":
                    long_name = body.split(b"\0", 1)[0]
                elif header.type == b"K":
                    long_link = body.split(b"\0", 1)[0]
                elif header.type in b"xX":
                    pax = parse_pax(body)
                continue

            size, kind, trouble = header.size, self._kind(header), None
            name = header.name if long_name is None else long_name
            link = header.link if long_link is None else long_link
            if pax is None:
                trouble = "its pax header is damaged"
            else:
                name, link = pax.get(b"path", name), pax.get(b"linkpath", link)
                digits = pax.get(b"size", b"0")
                if b"size" in pax and kind in ("file", "other"):
                    size, trouble = (int(digits), None) if digits.isdigit() else (0, "its pax header is damaged")
                if header.type == b"S" or any(key.startswith(b"GNU.sparse") for key in pax):
                    trouble = "a sparse file"
            if header.type == b"S" and block[482]:
                while len(more := reader.read(BLOCK)) == BLOCK and more[504]:
                    pass
            if header.type in BARE_TYPES:
                size = 0
            self._size, data_offset = size, reader.position
            text = name.decode("utf-8", "surrogateescape")
            if trouble is None:
                target = _target(text, link, symbolic=header.type == b"2") if kind == "link" else ""
                yield Member(text.rstrip("/") if kind == "folder" else text, kind, start, data_offset, size, target)
            left = data_offset + size - reader.position
            if left > 0:
                left -= reader.skip(left)
            if left > 0:
                detail = f"the archive ends {left} bytes before the end of {text}"
                yield Gap(start, reader.position, detail, cut=True)
                return
            reader.read(-size % BLOCK)
            if trouble is not None:
                yield Gap(start, reader.position, f"{text}: {trouble}")
            start, long_name, long_link, pax = None, None, None, {}

    @staticmethod
    def _kind(header: Header) -> str:
        if header.type in BARE_TYPES:
            return BARE_TYPES[header.type]
        if header.type in FILE_TYPES:
            return "folder" if header.name.endswith(b"/") else "file"
        return "other"

    def _after_bad_block(self, start: int, block: bytes, begun: bool) -> tuple[bool, Gap | None]:
        """(whether this is the end, what is lost) after a block that is no header; else a header is next."""
        reader, zero_blocks = self.reader, 0
        while block == ZEROS:
            zero_blocks += 1
            block = reader.read(BLOCK)
        self.end_marked = zero_blocks > 0
        if len(block) < BLOCK:
            # The end, marked by zeros or not; anything but a header begun or zeros left over is harmless.
            lost = begun or (zero_blocks < 2 and block.strip(b"\0"))
            return True, Gap(start, reader.position, "the archive ends inside a header", True) if lost else None
        zero_stop = reader.position - BLOCK
        if zero_blocks or parse_header(block) is None:
            reader.unread(block)
        found = self._find_header()
        if not found and zero_blocks >= 2 and not begun and not self._passed_over:
            return True, None  # the end and, behind it, something that is no tar
        detail = "damaged header"
        if zero_blocks:
            # Two tars joined end to end look the same; what says so costs nothing, a silent loss would.
            detail = "zeros, which mark the end, but more follows"
            if not found or reader.position > zero_stop:
                detail = "zeros or damaged data in place of a header"
        return not found, Gap(start, reader.position, detail)

    def _find_header(self) -> bool:
        """Move to the next valid header, at or after this position; False, at the end, where there is none."""
        reader, tail, scanned = self.reader, b"", 0
        self._passed_over = False
        while self._max_scan_bytes is None or scanned < self._max_scan_bytes:
            fresh = reader.read(SCAN_BYTES)
            window = tail + fresh
            at = self._first_header(window)
            if at is not None:
                reader.unread(window[at:])
                return True
            if len(fresh) < SCAN_BYTES:
                return False
            tail = window[-BLOCK:]  # where a header may have begun; keeps the steps of 512 bytes
            scanned += len(fresh)
        return False

    def _first_header(self, window: bytes) -> int | None:
        last = len(window) - BLOCK
        found: int | None = None
        # Headers since 1988 have a magic: found at any byte, for bytes may have been lost or added before.
        magic = window.find(b"ustar", MAGIC_OFFSET)
        while magic >= 0 and magic - MAGIC_OFFSET <= last:
            if self._acceptable(window[magic - MAGIC_OFFSET :][:BLOCK]):
                found = magic - MAGIC_OFFSET
                break
            magic = window.find(b"ustar", magic + 1)
        # Older ones have none: looked for where blocks begin.
        for at in range(0, (last if found is None else found) + 1, BLOCK):
            if window[at] and _CHECKSUM_FIELD.match(window, at + 148) and self._acceptable(window[at : at + BLOCK]):
                return at
        return found

    def _acceptable(self, block: bytes) -> bool:
        header = parse_header(block)
        if header is None or not header.name or header.type[0] not in KNOWN_TYPES:
            return False
        end = self.reader.end
        if end is not None and header.size > end and header.type in FILE_TYPES:
            return False
        name = header.name.decode("utf-8", "surrogateescape")
        if self._resume_at is None or (header.type in FILE_TYPES and self._resume_at(name)):
            return True
        self._passed_over = True
        return False
