"""gzip files front to back and from places inside: every form of the format, damage, and where reading begins again."""

import gzip
import random
import zlib
from pathlib import Path

import pytest

from data_prep.sources import gunzip
from data_prep.sources.deflate import inflater_at
from data_prep.sources.gunzip import Gunzip, Place
from data_prep.sources.inflate import Inflated
from data_prep.sources.streams import FileRange
from tests.support.archives import image_bytes

STEPS = (1, 511, 512, 70_000, 3, 1 << 20)


@pytest.fixture(params=["zlib-ng", "zlib"])
def library(request, monkeypatch):
    """Both: zlib is what is left where there is no wheel of zlib-ng."""
    if request.param == "zlib":
        monkeypatch.setattr(gunzip, "fast", zlib)
        monkeypatch.setattr(gunzip, "Error", zlib.error)
    else:
        assert gunzip.fast is not zlib, "zlib-ng is installed"
    return gunzip.fast


def photos(count: int = 12) -> bytes:
    """JPEGs with some text between, as a tar has."""
    return b"".join(image_bytes(seed, (700, 500)) + b"n00000001_%d.JPEG" % seed * 9 for seed in range(count))


def read(path: Path, start: Place | None = None) -> tuple[bytes, str | None]:
    """The content, by steps of many sizes, and the error."""
    parts, number = [], 0
    with Inflated(FileRange(str(path)), "gzip", start) as reader:
        while part := reader.read(STEPS[number % len(STEPS)]):
            parts.append(part)
            number += 1
        content = b"".join(parts)
        assert reader.position == len(content) + (start.position if start else 0)
        return content, reader.error


def member(data: bytes, level: int = 6, strategy: int = zlib.Z_DEFAULT_STRATEGY, flags: int = 0) -> bytes:
    packer = zlib.compressobj(level, wbits=-15, strategy=strategy)
    fields = {4: b"\5\0extra", 8: b"name\0", 16: b"comment\0", 2: b"hc"}
    header = b"\x1f\x8b\x08" + bytes([flags]) + bytes(6)
    header += b"".join(field for flag, field in fields.items() if flags & flag)
    trailer = zlib.crc32(data).to_bytes(4, "little") + (len(data) & 0xFFFFFFFF).to_bytes(4, "little")
    return header + packer.compress(data) + packer.flush() + trailer


def test_every_form(tmp_path, library):
    data = photos()
    forms = {
        **{f"level {level}": member(data, level) for level in (0, 1, 6, 9)},
        "fixed": member(data, strategy=zlib.Z_FIXED),
        "huffman": member(data, strategy=zlib.Z_HUFFMAN_ONLY),
        "header": member(data, flags=2 | 4 | 8 | 16),
        "members": member(data[:1000]) + member(b"") + member(data[1000:200_000], flags=8) + member(data[200_000:]),
        "padding": member(data[:5000]) + bytes(70_000) + member(data[5000:]) + bytes(512),
        "garbage": member(data) + b"something else",
        "short": member(data[:10]),
        "empty": member(b""),
        "zeros": member(bytes(5 << 20)),
    }
    for name, packed in forms.items():
        (path := tmp_path / "a.gz").write_bytes(packed)
        content, error = read(path)
        wanted = {"short": data[:10], "empty": b"", "zeros": bytes(5 << 20)}.get(name, data)
        assert error is None, name
        assert content == wanted, name


def test_damage_is_told_and_what_comes_before_it_is_given(tmp_path, library):
    data = photos()
    packed, path = member(data, flags=8), tmp_path / "a.gz"
    block = 3 * gunzip.COMPRESSED_BLOCK_BYTES
    for cut in (5, 12, 17, 5000, len(packed) // 2, len(packed) - 9, len(packed) - 8, len(packed) - 1):
        path.write_bytes(packed[:cut])
        content, error = read(path)
        assert error == f"compressed data is broken or cut short near byte {cut}: the end is missing"
        assert data.startswith(content)
        assert len(content) > cut - block
    for at, said in ((len(packed) - 8, "incorrect data check"), (len(packed) - 4, "incorrect length check")):
        path.write_bytes(packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :] + member(b"more"))
        content, error = read(path)
        assert error is not None
        assert said in error
        assert content == data
    rng = random.Random(0)
    for _ in range(15):
        at = rng.randrange(20, len(packed) - 8)
        path.write_bytes(packed[:at] + bytes([packed[at] ^ 1 << rng.randrange(8)]) + packed[at + 1 :])
        content, error = read(path)
        assert error is not None, at
        sound = max(0, at - block)
        assert content[:sound] == data[:sound]
    path.write_bytes(packed + b"\x1f")  # another member's beginning, for all that is known
    assert read(path)[0] == data
    assert "the end is missing" in str(read(path)[1])
    path.write_bytes(b"\x1f\x8b\x07" + bytes(30))
    assert "unknown compression method 7" in str(read(path)[1])


def places(path: Path) -> list[Place]:
    found: list[Place] = []
    with FileRange(str(path)) as file:
        reader = Gunzip(file)
        for _ in reader:
            if reader.place is not None and reader.place not in found[-1:]:
                found.append(reader.place)
    return found


FORMS = {
    "level 1": lambda data: member(data, 1),
    "level 6": member,
    "level 9": lambda data: member(data, 9),
    "stored": lambda data: member(data, 0),
    "huffman": lambda data: member(data, strategy=zlib.Z_HUFFMAN_ONLY),
    "members": lambda data: member(data[:1000]) + member(data[1000:300_000], flags=8) + member(data[300_000:]),
}


@pytest.mark.parametrize("form", FORMS)
def test_reading_begins_again_at_every_place_found(tmp_path, library, form, monkeypatch):
    data = photos(30)
    packed, path = FORMS[form](data), tmp_path / "a.gz"
    path.write_bytes(packed)
    monkeypatch.setattr(gunzip, "PLACE_EVERY_BYTES", 1 << 17)
    found = places(path)
    assert len(found) >= len(data) // (4 << 17)
    for place in found:
        assert place.window == data[place.position - (1 << 15) : place.position]
        assert read(path, place) == (data[place.position :], None)
    # The checksum covers what came before the place, too.
    path.write_bytes(packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:])
    content, error = read(path, found[-1])
    assert content == data[found[-1].position :]
    assert "incorrect data check" in str(error)


def test_a_block_may_begin_at_any_bit(library):
    rng = random.Random(1)
    before, data = rng.randbytes(1 << 15), photos(2)
    packer = zlib.compressobj(6, wbits=-15, zdict=before)
    packed = packer.compress(data) + packer.flush()
    whole = int.from_bytes(packed, "little")
    for bit in range(8):
        moved = (whole << bit | rng.randrange(1 << bit)).to_bytes(len(packed) + 1, "little")
        inflate = inflater_at(library, moved[:1], bit, before)
        assert inflate.decompress(moved[1:]) + inflate.flush() == data
        assert inflate.eof


def test_as_the_standard_library_reads_it(tmp_path, library):
    rng = random.Random(2)
    for _ in range(40):
        parts = [rng.randbytes(rng.randrange(1, 5)) * rng.randrange(60_000) for _ in range(rng.randrange(1, 6))]
        (path := tmp_path / "a.gz").write_bytes(b"".join(gzip.compress(part, rng.randrange(10)) for part in parts))
        assert read(path) == (gzip.decompress(path.read_bytes()), None)
