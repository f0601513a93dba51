"""JPEG files without decoding: the frame, the segments before the scan, EXIF orientation, broken segments."""

import struct
from collections.abc import Iterator
from typing import NamedTuple

SOI, EOI, SOS = b"\xff\xd8", b"\xff\xd9", 0xDA
BASELINE = 0xC0  # SOF0
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # those three are tables
WITHOUT_LENGTH = frozenset((0x00, 0x01, *range(0xD0, 0xDA)))  # markers that no segment follows
EXIF, ICC = b"Exif\0\0", b"ICC_PROFILE\0"
ORIENTATION = 0x0112  # TIFF tag
TIFF_INTEGERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}  # some writers take another than SHORT
TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}


class JpegFrame(NamedTuple):
    """What a JPEG's frame header says. `marker` is 0xC0 for baseline, 0xC2 for progressive."""

    marker: int
    width: int
    height: int
    components: int


class Segment(NamedTuple):
    """One marker segment: bytes `begin` (the 0xFF) to `end` of the file."""

    marker: int
    begin: int
    end: int


class JpegHeader(NamedTuple):
    """All that stands before the first scan's data. `precision` in bits; `scan` is where its data begins."""

    frame: JpegFrame
    precision: int
    segments: tuple[Segment, ...]
    scan: int


class Metadata(NamedTuple):
    """`orientation` is EXIF's, 1 to 8; `broken` lists ("broken_exif" or "broken_icc", its segment)."""

    orientation: int
    broken: tuple[tuple[str, Segment], ...]


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """The frame header of a JPEG, or None where there is none. Reads headers only, decodes nothing."""
    if data[:2] != SOI:
        return None
    for segment in _segments(data):
        if segment.marker in FRAMES and segment.begin + 10 <= len(data):
            return _frame(data, segment)
    return None


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The whole header, or None for what is no JPEG, or one with junk, a gap or an end before its scan."""
    if data[:2] != SOI:
        return None
    segments: list[Segment] = []
    frame, precision = None, 0
    for segment in _segments(data):
        marker, begin, end = segment
        if end > len(data) or end < begin + 4 or marker in WITHOUT_LENGTH:
            return None
        segments.append(segment)
        if marker in FRAMES:
            if frame or end < begin + 10 or end != begin + 10 + 3 * data[begin + 9]:
                return None
            frame, precision = _frame(data, segment), data[begin + 4]
        elif marker == SOS:
            return JpegHeader(frame, precision, tuple(segments), end) if frame else None
    return None


def _segments(data: bytes) -> Iterator[Segment]:
    """The segments up to the first scan's header; ends early where no marker stands."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        yield Segment(marker, at, end)
        if marker == SOS:
            return
        at = end


def _frame(data: bytes, segment: Segment) -> JpegFrame:
    height, width, components = struct.unpack_from(">HHB", data, segment.begin + 5)
    return JpegFrame(segment.marker, width, height, components)


def is_closed(data: bytes, header: JpegHeader) -> bool:
    """Whether an end marker follows the scan; bytes after it do not matter."""
    return data.endswith(EOI) or data.rfind(EOI, header.scan) >= 0


def metadata(data: bytes, header: JpegHeader) -> Metadata:
    """Parse EXIF's first directory and the colour profile, which readers trip over when they are damaged."""
    exif = [s for s in header.segments if s.marker == 0xE1 and data.startswith(EXIF, s.begin + 4)]
    icc = [s for s in header.segments if s.marker == 0xE2 and data.startswith(ICC, s.begin + 4)]
    broken: list[tuple[str, Segment]] = []
    orientation: int | None = 1
    if exif:  # more than 64 KiB is spread over several segments
        orientation = _exif_orientation(b"".join(data[s.begin + 10 : s.end] for s in exif))
        if orientation is None:
            broken += [("broken_exif", s) for s in exif]
    if icc and not _icc_is_whole([data[s.begin + 16 : s.end] for s in icc]):
        broken += [("broken_icc", s) for s in icc]
    return Metadata(orientation or 1, tuple(broken))


def _exif_orientation(tiff: bytes) -> int | None:
    """Orientation in the first directory, 1 where it says nothing; None where the directory cannot be read."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    orientation = 1
    try:
        (at,) = struct.unpack_from(order + "L", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, at)
        struct.unpack_from(order + "L", tiff, at + 2 + 12 * entries)  # where the next directory is
        for entry in range(at + 2, at + 2 + 12 * entries, 12):
            tag, kind, values, offset = struct.unpack_from(order + "HHLL", tiff, entry)
            size = TIFF_TYPE_BYTES.get(kind, 0) * values
            if size > 4 and offset + size > len(tiff):
                return None
            if tag == ORIENTATION and kind in TIFF_INTEGERS:
                place = entry + 8 if size <= 4 else offset
                (orientation,) = struct.unpack_from(order + TIFF_INTEGERS[kind], tiff, place)
    except struct.error:
        return None
    return orientation if 1 <= orientation <= 8 else 1


def _icc_is_whole(chunks: list[bytes]) -> bool:
    """Whether the chunks (number, count, data) are all there and make an ICC profile (ICC.1, section 7.2)."""
    chunks = sorted(chunks)
    numbers = [(index + 1, len(chunks)) for index in range(len(chunks))]
    if [tuple(chunk[:2]) for chunk in chunks] != numbers:
        return False
    profile = b"".join(chunk[2:] for chunk in chunks)
    return len(profile) >= 128 and profile[36:40] == b"acsp" and int.from_bytes(profile[:4], "big") <= len(profile)


def without(data: bytes, segments: list[Segment]) -> bytes:
    """The file less these segments; every other byte stays, the scan's among them."""
    pieces, at = [], 0
    for segment in sorted(segments, key=lambda s: s.begin):
        pieces.append(data[at : segment.begin])
        at = segment.end
    return b"".join((*pieces, data[at:]))
