"""The headers of a tar, as GNU tar, bsdtar and tarfile write them: v7, ustar, GNU and pax."""

import zlib
from typing import NamedTuple

BLOCK = 512
CHECKSUM = slice(148, 156)


class Header(NamedTuple):
    name: bytes
    size: int
    type: bytes
    link: bytes = b""  # what a link names


def parse_header(block: bytes) -> Header | None:
    """The header in a block of 512 bytes, or None where that is not one."""
    stated = _number(block[CHECKSUM])
    if stated is None:
        return None
    # The checksum is taken with its own field as spaces.
    filler = 8 * 32 - sum(block[CHECKSUM])
    # Adler-32 holds the sum of the bytes, modulo 65521, in a twentieth of the time of sum().
    if zlib.adler32(block) & 0xFFFF != (1 + stated - filler) % 65521:
        # Some old tars summed signed bytes.
        signed = sum(b - 256 if b > 127 else b for b in block)
        if signed + 8 * 32 - sum(b - 256 if b > 127 else b for b in block[CHECKSUM]) != stated:
            return None
    size = _number(block[124:136])
    # Where a byte was lost, the sum may still be right, but the magic is in the wrong place.
    if size is None or (block[257:262] != b"ustar" and b"ustar" in block[250:270]):
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:  # GNU's magic differs: it has times there
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return Header(name, size, block[156:157], block[157:257].split(b"\0", 1)[0])


def _number(field: bytes) -> int | None:
    if field[0] == 0x80:  # base-256, for sizes over 8 GiB
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    if not digits.isdigit():
        return None
    try:
        return int(digits, 8)
    except ValueError:
        return None


def parse_pax(body: bytes) -> dict[bytes, bytes] | None:
    """Keywords of a pax header, or None where it is damaged."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(body) and body[at]:
        digits, space, _ = body[at : at + 20].partition(b" ")
        if not space or not digits.isdigit():
            return None
        stop = at + int(digits)
        key, equals, value = body[at + len(digits) + 1 : stop].partition(b"=")
        if stop > len(body) or not equals or not value.endswith(b"\n"):
            return None
        found[key] = value[:-1]
        at = stop
    return found
