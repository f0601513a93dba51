"""The tar reader: against tarfile on sound archives, against the truth on damaged ones."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest

from data_prep.sources.archives import TarOfTars
from data_prep.sources.detect import open_source
from data_prep.sources.file_archives import TarOfClassFolders
from data_prep.sources.inflate import Inflated
from data_prep.sources.items import Damage, Record
from data_prep.sources.streams import FileRange
from data_prep.sources.tar import Gap, Member, Tar
from data_prep.tar_header import BLOCK, parse_pax

NAMES = {
    "short": "n01440764_1.JPEG",
    "folders": "a/b/c.JPEG",
    "98 bytes": "x" * 93 + ".JPEG",
    "100 bytes": "x" * 95 + ".JPEG",
    "ustar prefix": "d" * 80 + "/" + "e" * 80 + ".JPEG",
    "unicode": "ümlaut/日本.JPEG",
    "long": "long/" + "y" * 300 + ".JPEG",
    "long unicode": "ü" * 200 + ".JPEG",
    "not UTF-8": "caf\udce9.JPEG",
}


def write_tar(members: list[tuple[str, bytes]], fmt: int = tarfile.GNU_FORMAT, **fields) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=fmt) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def read(path: Path, data: bytes, *, compressed: bool = False) -> list[tuple[Member, bytes | None] | Gap]:
    path.write_bytes(gzip.compress(data, 1) if compressed else data)
    file = FileRange(str(path))
    with Inflated(file, "gzip") if compressed else file as reader:
        tar = Tar(reader)
        found: list[tuple[Member, bytes | None] | Gap] = []
        for entry in tar:
            found.append(entry if isinstance(entry, Gap) else (entry, tar.data()))
    return found


def names_of(found: list) -> list[str]:
    return [entry[0].name for entry in found if not isinstance(entry, Gap)]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_same_as_tarfile(tmp_path, fmt, compressed):
    rng = random.Random(0)
    members = [(name, rng.randbytes(rng.choice((0, 1, 511, 512, 513, 9000)))) for name in NAMES.values()]
    if fmt == tarfile.USTAR_FORMAT:
        members = [member for member in members if not member[0].startswith(("long", "ü" * 9))]
    data = write_tar(members, fmt, mtime=1.5 if fmt == tarfile.PAX_FORMAT else 0)
    found = read(tmp_path / "a.tar", data, compressed=compressed)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        theirs = [
            (Member(m.name, "file", m.offset, m.offset_data, m.size), tar.extractfile(m).read())  # type: ignore[union-attr]
            for m in tar
        ]
    assert found == theirs
    assert [content for _, content in theirs] == [content for _, content in members]


def test_kinds_of_members_and_global_headers(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 600}) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("s", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE), ("f", b"6")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("last"))
    found = read(tmp_path / "a.tar", file.getvalue())
    assert [(m.name, m.kind) for m, _ in found] == [  # type: ignore[misc]
        *(("d", "folder"), ("s", "link"), ("h", "link"), ("f", "other"), ("last", "file"))
    ]


@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sizes_over_8_gib(tmp_path, fmt):
    size = 9 << 30
    info = tarfile.TarInfo("huge")
    info.size = size
    header = info.tobuf(fmt)
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:  # a sparse file: its data takes no disk
        file.write(header)
        file.seek(len(header) + size)
        file.write(write_tar([("after", b"abc")]))
    with FileRange(str(path)) as reader:
        assert [(e.name, e.size) for e in Tar(reader) if isinstance(e, Member)] == [("huge", size), ("after", 3)]


def test_a_size_beyond_the_end_allocates_nothing(tmp_path):
    info = tarfile.TarInfo("a")
    info.size = 1 << 60
    found = read(tmp_path / "a.tar", info.tobuf(tarfile.GNU_FORMAT) + b"x" * 700)
    assert isinstance(found[-1], Gap)
    assert found[-1].cut
    assert found[0][1] is None  # type: ignore[index]


@pytest.mark.parametrize("tail", [b"", b"x" * 300, b"garbage" * 3000, bytes(100_000)])
def test_what_follows_the_end_is_harmless(tmp_path, tail):
    assert names_of(read(tmp_path / "a.tar", write_tar([("a", b"1"), ("b", b"2")]) + tail)) == ["a", "b"]


def test_missing_end_is_harmless_and_joined_tars_are_read_and_told(tmp_path):
    data = write_tar([("a", b"1"), ("b", b"2" * 600)])
    for stop in (512 * 2 + 512 * 3, 512 * 2 + 512 + 600):
        found = read(tmp_path / "a.tar", data[:stop])
        assert found[1][1] == b"2" * 600  # type: ignore[index]
        assert len(found) == 2
    joined = read(tmp_path / "a.tar", data + write_tar([("c", b"3")]))
    assert names_of(joined) == ["a", "b", "c"]
    assert sum(isinstance(entry, Gap) for entry in joined) == 1


def damaged(kind: str, data: bytes, at: int) -> bytes:
    """`data` with the header at `at` damaged."""
    if kind == "garbage":
        return data[:at] + b"\x07" * 100 + data[at + 100 :]
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    if kind == "zero block":
        return data[:at] + bytes(BLOCK) + data[at + BLOCK :]
    if kind == "zero sector":
        return data[:at] + bytes(8 * BLOCK) + data[at + 8 * BLOCK :]
    return data[:at] + b"inserted" + data[at:]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["garbage", "bit", "zero block", "zero sector", "insertion"])
def test_reading_goes_on_behind_a_damaged_header(tmp_path, kind, compressed):
    members = [(f"m{i}", bytes([65 + i]) * 5000) for i in range(6)]
    data = write_tar(members)
    at = 2 * (BLOCK + 5120)
    found = read(tmp_path / "a.tar", damaged(kind, data, at), compressed=compressed)
    gaps = [entry for entry in found if isinstance(entry, Gap)]
    assert len(gaps) == 1
    assert gaps[0].start == at
    lost = [] if kind == "insertion" else ["m2"]
    assert names_of(found) == [name for name, _ in members if name not in lost]
    assert all(content == dict(members)[m.name] for m, content in (e for e in found if not isinstance(e, Gap)))


def test_v7_headers_are_found_again(tmp_path):
    data = bytearray(write_tar([(f"m{i}", b"x" * 2000) for i in range(4)]))
    for at in range(0, 4 * 2560, 2560):
        data[at + 257 : at + 512] = bytes(255)
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    assert names_of(read(tmp_path / "a.tar", bytes(data))) == ["m0", "m1", "m2", "m3"]
    assert names_of(read(tmp_path / "a.tar", damaged("bit", bytes(data), 2560))) == ["m0", "m2", "m3"]


@pytest.mark.parametrize(
    "body", [b"", b"abc", b"999 path=x\n", b"5 a=b", b"7 ab=c", b"-5 a=b\n", b"99999999999999999999999 "]
)
def test_pax_headers_never_raise(body):
    assert parse_pax(body) in (None, {})


def test_pax_header_damaged_inside(tmp_path):
    data = write_tar([("ü" * 100, b"1"), ("b", b"2")], tarfile.PAX_FORMAT)
    at = data.index(b" path=")
    found = read(tmp_path / "a.tar", data[: at - 1] + b"x" + data[at:])
    assert isinstance(found[0], Gap)
    assert names_of(found) == ["b"]


def small_archive(rng: random.Random) -> tuple[bytes, dict[tuple[str, str], tuple[int, int, bytes]]]:
    """A tar of synset tars, and where in it each image lies: (wnid, name) -> (start of its header, stop, data)."""
    outer: list[tuple[str, bytes]] = []
    truth, base = {}, 0
    for number in range(1, rng.randint(2, 5)):
        wnid = f"n{number:08d}"
        images = [
            (f"{wnid}_{i}" + rng.choice(("", "", "/" + "z" * 94)) + ".JPEG", rng.randbytes(rng.randint(0, 3000)))
            for i in range(rng.randint(1, 5))
        ]
        inner = write_tar(images, rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)))
        with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
            for member, (name, data) in zip(tar, images, strict=True):
                start = base + BLOCK + member.offset
                truth[wnid, name] = (start, base + BLOCK + member.offset_data + member.size, data)
        outer.append((f"{wnid}.tar", inner))
        base += BLOCK + len(inner) + -len(inner) % BLOCK
    return write_tar(outer), truth


def mutated(rng: random.Random, data: bytes) -> tuple[bytes, str, int, int]:
    """(bytes, kind, first byte changed, bytes changed)."""
    kind, at = rng.choice(("flip", "flips", "cut", "insert", "delete", "zeros")), rng.randrange(len(data))
    size = rng.choice((1, 3, 512, 700, 4096))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], kind, at, 1
    if kind == "flips":
        return data[:at] + rng.randbytes(min(size, len(data) - at)) + data[at + size :], kind, at, size
    if kind == "cut":
        return data[:at], kind, at, len(data)
    if kind == "insert":
        return data[:at] + rng.randbytes(size) + data[at:], kind, at, 0
    if kind == "delete":
        return data[:at] + data[at + size :], kind, at, size
    return data[:at] + bytes(min(size, len(data) - at)) + data[at + size :], kind, at, size


def small_tree(rng: random.Random) -> tuple[bytes, dict[tuple[str, str], tuple[int, int, bytes]]]:
    """A tar of class folders, and the same truth."""
    images = {
        (f"n{number:08d}", f"{i}" + rng.choice(("", "/" + "z" * 94)) + ".JPEG"): rng.randbytes(rng.randint(0, 3000))
        for number in range(1, rng.randint(2, 5))
        for i in range(rng.randint(1, 5))
    }
    data = write_tar([("/".join(key), content) for key, content in images.items()], rng.choice((0, 1, 2)))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        where = [(member.offset, member.offset_data + member.size) for member in tar]
    return data, {key: (*at, images[key]) for key, at in zip(images, where, strict=True)}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_thousand_mutated_archives(tmp_path, seed):
    """No exception, no hang; each image that the mutation left alone is given, or a damage is told."""
    rng = random.Random(seed)
    path = tmp_path / "a.tar"
    given = 0
    for number in range(1000):
        data, truth = small_tree(rng) if number % 4 == 0 else small_archive(rng)
        bad, kind, at, size = mutated(rng, data)
        compressed = number % 5 == 0
        path.write_bytes(gzip.compress(bad, 1) if compressed else bad)
        if not bad.strip(b"\0"):
            continue  # refused as empty
        tree = TarOfClassFolders(str(path), "train", has_splits=False)
        source = tree if number % 4 == 0 else TarOfTars(str(path), "train")
        if compressed:
            items = [event for event in source.events() if isinstance(event, Record | Damage)]
        else:
            chunks = source.chunks(rng.choice((1000, 10_000, 1 << 20)), 100, None)
            items = [item for chunk in chunks for item in chunk.items() if isinstance(item, Record | Damage)]
        records = {(item.wnid, item.name): item.data for item in items if isinstance(item, Record)}
        told = any(isinstance(item, Damage) for item in items)
        if kind == "delete":
            continue  # where whole blocks are gone, one image may have swallowed the next: only decoding can tell
        for key, (start, stop, content) in truth.items():
            untouched = stop <= at or start >= at + size
            if key in records:
                given += 1
                assert not untouched or records[key] == content, (number, kind, at)
                assert len(records[key]) == len(content), (number, kind, at)
            else:
                assert told or not untouched, (number, kind, at, size, key)
    assert given > 5000


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_gzip_streams(tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(150):
        data, truth = small_archive(rng)
        packed = gzip.compress(data, 6)
        at = rng.randrange(12, len(packed))
        bad = rng.choice((packed[:at], packed[:at] + bytes([packed[at] ^ 8]) + packed[at + 1 :]))
        path = tmp_path / "a.tar.gz"
        path.write_bytes(bad)
        try:
            source = open_source(path, kind="tar-of-tars")
        except ValueError as error:
            assert "damaged" in str(error) or "empty" in str(error)  # noqa: PT017
            continue
        items = [event for event in source.events() if isinstance(event, Record | Damage)]
        assert any(isinstance(item, Damage) for item in items)
        for item in items:
            if isinstance(item, Record) and (item.wnid, item.name) in truth:
                assert len(item.data) == len(truth[item.wnid, item.name][2])
