"""Where blocks of deflated data (RFC 1951) begin, and inflating from there.

The inflaters of the registry do not tell where a block begins, nor do they begin at a bit. Both is had from outside:
each place that could be a block's beginning is tried, and taken where it gives the content that is known; and before a
block that begins inside a byte empty blocks are put, which fill that byte up to there.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

WINDOW_BYTES = 1 << 15  # how far back deflated data refers
TRIED_FIRST_BYTES = 1 << 11  # most of what is no block fails within these
MIN_MATCH_BYTES = 1 << 10  # of content, to be sure: what is no block would have to give them by chance

_PRECODE_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)


def _bits(value: int, count: int) -> list[int]:
    return [value >> at & 1 for at in range(count)]


def _empty_blocks() -> list[tuple[int, int]]:
    """By bit offset 0 to 7: empty blocks that end there as (bits, the first one lowest; how many)."""
    fixed = [0, 1, 0, *[0] * 7]  # not the last, fixed code, end of block: 10 bits
    # Of odd length: an own code of literal 255, end of block, and one distance, which are a bit each.
    precode = {18: 1, 1: 1}  # lengths of the code of code lengths: 18, a run of zeros, is 1; 1 is 0
    own = [0, 0, 1, *_bits(0, 5), *_bits(0, 5), *_bits(18 - 4, 4)]
    for symbol in _PRECODE_ORDER[:18]:
        own += _bits(precode.get(symbol, 0), 3)
    own += [1, *_bits(138 - 11, 7), 1, *_bits(117 - 11, 7), 0, 0, 0]
    own += [1]  # end of block
    found: dict[int, list[int]] = {}
    for bits in ([], own):
        for count in range(4):
            blocks = bits + fixed * count
            found[len(blocks) % 8] = blocks
    return [(sum(bit << at for at, bit in enumerate(found[k])), len(found[k])) for k in range(8)]


EMPTY_BLOCKS = _empty_blocks()


def inflater_at(library: Any, first: bytes, bit: int, window: bytes) -> Any:
    """An inflater that stands at bit `bit` of the byte `first`, with the content before it; the next byte is next."""
    inflate = library.decompressobj(-15, zdict=window)
    bits, count = EMPTY_BLOCKS[bit]
    bits |= first[0] >> bit << count
    out = inflate.decompress(bits.to_bytes((count - bit) // 8 + 1, "little"))
    assert not out, "of less than a byte"
    return inflate


def find_block(library: Any, data: bytes, before: bytes, content: bytes) -> tuple[int, int] | None:
    """(bit in `data`, byte in `content`) where a block begins, the first that is found; or None.

    content: what `data` inflates to, its last bytes to the last; before: the content before, 32 KiB.
    """
    for bit in candidates(data):
        byte = bit // 8
        try:
            # What a block holds is as long whatever it refers to.
            inflate = inflater_at(library, data[byte : byte + 1], bit % 8, bytes(WINDOW_BYTES))
            size = len(inflate.decompress(data[byte + 1 : byte + TRIED_FIRST_BYTES]))
            size += len(inflate.decompress(data[byte + TRIED_FIRST_BYTES :]))
            if inflate.eof or not MIN_MATCH_BYTES <= size <= len(content):
                continue
            at = len(content) - size
            inflate = inflater_at(library, data[byte : byte + 1], bit % 8, (before + content[:at])[-WINDOW_BYTES:])
            if inflate.decompress(data[byte + 1 :]) == content[at:]:
                return bit, at
        except library.error:
            continue
    return None


def candidates(data: bytes) -> Iterator[int]:
    """Bits where a stored block or one with a code of its own could begin, which is not the last one, ascending."""
    array = np.frombuffer(data, np.uint8)
    bits = np.unpackbits(array, bitorder="little")
    yield from np.sort(np.concatenate([_stored(array, bits), _with_a_code(bits)])).tolist()


def _stored(array: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """A stored block's size stands twice, at a byte, the second time inverted; before it three bits 0."""
    if len(array) < 8:
        return np.empty(0, np.int64)
    wide = array.astype(np.uint16)
    pairs = wide[:-1] | wide[1:] << 8
    byte = np.nonzero((pairs[1:-2] ^ pairs[3:]) == 0xFFFF)[0] + 1
    bit = 8 * byte - 3
    return bit[~(bits[bit] | bits[bit + 1] | bits[bit + 2]).astype(bool)]


def _with_a_code(bits: np.ndarray) -> np.ndarray:
    """A block whose own code is whole: the one that its code lengths are written in."""
    last = len(bits) - 17 - 3 * len(_PRECODE_ORDER)
    if last <= 0:
        return np.empty(0, np.int64)
    # Not the last block (0), own code (2); at most 30 codes of each kind beside those that are always there.
    at = np.nonzero((bits[:last] == 0) & (bits[1 : last + 1] == 0) & (bits[2 : last + 2] == 1))[0]
    at = at[(_number(bits, at + 3, 5) < 30) & (_number(bits, at + 8, 5) < 30)]
    count = _number(bits, at + 13, 4) + 4
    filled = np.zeros(len(at), np.int64)  # of 128 parts
    for place in range(len(_PRECODE_ORDER)):
        length = _number(bits, at + 17 + 3 * place, 3)
        filled += np.where((place < count) & (length > 0), 128 >> length, 0)
    return at[filled == 128]


def _number(bits: np.ndarray, at: np.ndarray, count: int) -> np.ndarray:
    return sum(bits[at + place].astype(np.int64) << place for place in range(count))
