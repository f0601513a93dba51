"""Sources of every kind, local and behind S3's API: detection, chunks, spool, strays, damage, messages."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import shutil
import tarfile
from pathlib import Path

import psutil
import pytest

from data_prep.build.ingest import name_hash
from data_prep.sources import gunzip
from data_prep.sources.detect import KINDS, OTHER_ARCHIVES, open_source
from data_prep.sources.items import Damage, Met, Record, Stray
from data_prep.sources.streams import FileRange, SourceError
from data_prep.storage import Folder
from tests.support.source_forms import (
    FORMS,
    WNIDS,
    Truth,
    all_chunks,
    class_folders,
    content,
    images,
    items_of,
    synset_tars,
    tar_of,
    tar_of_tars,
    truth_of,
    write,
)


@pytest.fixture
def s3_url(s3) -> str:
    """URL of a bucket behind a real S3 API on this host."""
    return "s3://bucket"


def upload(path: Path, url: str) -> str:
    import s3fs

    target = f"{url}/{random.randrange(1 << 60):x}/{path.name}"
    s3fs.S3FileSystem().put(str(path), target.removeprefix("s3://"), recursive=path.is_dir())
    return target


@pytest.mark.parametrize("place", ["local", "s3"])
@pytest.mark.parametrize("form", FORMS)
def test_every_kind_is_detected_and_read(tmp_path, form, place, request):
    path, kind, truth, strays = FORMS[form](tmp_path)
    where = upload(path, request.getfixturevalue("s3_url")) if place == "s3" else str(path)
    source = open_source(where)
    assert source.kind == kind
    assert source.seekable == (
        not path.is_file() or not any(form.endswith(z) for z in ("gz", "members", "bz2", "xz", "p"))
    )
    assert where in source.description
    assert set(source.splits) == {split for split, _, _ in truth}
    spool = Folder(tmp_path / "spool")
    for max_bytes in (3000, 1 << 30) if place == "s3" else (1, 3000, 20_000, 1 << 30):
        chunks = all_chunks(source, max_bytes, spool)
        items = items_of(chunks)
        assert truth_of(items) == truth
        assert not any(isinstance(item, Damage) for item in items)
        found = {
            Path(i.name).name if i.reason == "small_class" else i.name: i.reason for i in items if isinstance(i, Stray)
        }
        assert found == strays
        assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
        for chunk in chunks:
            own = pickle.loads(pickle.dumps(chunk)).items()
            assert all(item.split == chunk.split for item in own)
            assert (chunk.spool is None) == source.seekable
        classes = {wnid for chunk in chunks for wnid in chunk.classes}
        empty = {"n00000007"} if kind in ("tar-of-tars", "tar-of-class-folders") and "21k" not in form else set()
        assert classes == {wnid for _, wnid, _ in truth} | empty
    assert chunks == all_chunks(open_source(where), 1 << 30, spool)
    if place == "s3":
        assert source.fingerprint() == open_source(path).fingerprint()


@pytest.mark.parametrize("form", FORMS)
def test_bounds_of_a_chunk(tmp_path, form):
    source = open_source(FORMS[form](tmp_path)[0])
    for chunk in all_chunks(source, 3000, Folder(tmp_path / "spool"), max_images=4):
        held = [item for item in chunk.items() if isinstance(item, Record)]
        assert len(held) <= 1 or chunk.bytes <= 3000 + 10_240 or any(p.path.endswith("gz") for p in chunk.pieces)
        if source.kind not in ("tar-of-tars", "folder-of-tars") or chunk.spool:
            assert len(held) <= 4
        assert chunk.label.endswith(f" of {source.name}")
    numbers = [len(all_chunks(source, b, Folder(tmp_path / "spool"))) for b in (1, 3000, 1 << 30)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > numbers[-1]


def test_spool_holds_what_was_asked_for_and_no_more(tmp_path):
    path, _, truth, _ = tar_of_tars(tmp_path, gzip.compress)
    source, spool = open_source(path), Folder(tmp_path / "spool")
    with pytest.raises(SourceError, match="needs a spool folder"):
        next(source.chunks(3000, 1000, None))
    whole = all_chunks(source, 3000, spool)
    shutil.rmtree(tmp_path / "spool")
    read: Truth = {}
    done = {0, 3, 4}
    for chunk in source.chunks(3000, 1000, spool, done):
        assert len(spool.names()) == (chunk.number not in done)
        same = whole[chunk.number]
        assert (chunk.bytes, chunk.classes, chunk.label, chunk.split) == (
            same.bytes,
            same.classes,
            same.label,
            same.split,
        )
        if chunk.number in done:
            assert chunk.spool is None
            assert list(chunk.items()) == []
        else:
            read |= truth_of(list(chunk.items()))
            assert chunk.spool is not None
            spool.remove(chunk.spool)
    assert 0 < len(read) < len(truth)
    assert read.items() <= truth.items()
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot be written"):
        next(source.chunks(3000, 1000, Folder(tmp_path / "file" / "spool")))


def test_an_inner_tar_over_the_bound_is_split_where_members_begin(tmp_path):
    names = {f"n00000001_{i}{'y' * (120 if i % 3 == 0 else 0)}.JPEG": content(i) for i in range(60)}
    inner = tar_of(names)
    for path in (
        write(tmp_path / "a.tar", tar_of({"n00000001.tar": inner, "n00000002.tar": tar_of({"b": b"1"})})),
        write(tmp_path / "tars" / "n00000001.tar", inner).parent,
    ):
        chunks = all_chunks(open_source(path), 10_000, Folder(tmp_path))
        assert len(chunks) > 5
        assert all(chunk.bytes <= 10_000 + 1024 for chunk in chunks[:-1])
        found = truth_of(items_of(chunks))
        assert {name: data for (_, wnid, name), data in found.items() if wnid == "n00000001"} == names
        by_images = open_source(path).chunks(20_000, 7, None)
        assert max(sum(isinstance(i, Record) for i in chunk.items()) for chunk in by_images) <= 8


def test_links_are_strays(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"l{kind.decode()}.JPEG")
            info.type, info.linkname = kind, "a"
            tar.addfile(info)
    path = write(tmp_path / "a.tar", tar_of({"n00000001.tar": file.getvalue()}))
    assert [i.reason for i in items_of(all_chunks(open_source(path), 1000, Folder(tmp_path)))] == ["link"] * 2  # type: ignore[union-attr]
    folder = write(tmp_path / "set" / "n00000001" / "a.JPEG", b"1").parent
    (folder / "b.JPEG").symlink_to(folder / "a.JPEG")
    (folder / "c.JPEG").symlink_to(folder / "nowhere")
    items = items_of(all_chunks(open_source(tmp_path / "set"), 1000, Folder(tmp_path)))
    assert [item.name for item in items] == ["a.JPEG", "b.JPEG", "n00000001/c.JPEG"]  # type: ignore[union-attr]


def test_a_lost_outer_header_loses_no_image(tmp_path):
    truth = images("train")
    data = bytearray(tar_of(synset_tars(truth)))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = tar.getmembers()[1].offset
    data[at : at + 50] = b"\xff" * 50
    spool = Folder(tmp_path / "spool")
    for path in (write(tmp_path / "a.tar", bytes(data)), write(tmp_path / "a.tar.gz", gzip.compress(bytes(data)))):
        items = items_of(all_chunks(open_source(path), 3000, spool))
        damages = [item for item in items if isinstance(item, Damage)]
        assert f"bytes {at} to {at + 512} cannot be read: damaged header" in damages[0].detail or path.suffix == ".tar"
        assert damages[0].where == path.name
        lost = {key[2] for key in truth.keys() - truth_of(items).keys()}
        assert lost == {f"sub/ümlaut {WNIDS[1]}.JPEG"}  # whose name does not tell its class
        assert lost == {item.name for item in items if isinstance(item, Stray)}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_cut_archive_gives_what_is_left_and_one_damage(tmp_path, pack):
    truth = images("train")
    data = tar_of(synset_tars(truth))
    for path, whole in (
        (tmp_path / "a", data),
        (tmp_path / "b", tar_of({"/".join(k[1:]): d for k, d in truth.items()})),
    ):
        packed = pack(whole)
        write(path, packed[: len(packed) * 2 // 3])
        items = items_of(all_chunks(open_source(path), 3000, Folder(tmp_path / "spool")))
        found = truth_of(items)
        assert truth.items() >= found.items()
        assert len(found) > len(truth) // 3
        assert [isinstance(item, Damage) for item in items].count(True) == 1
        assert isinstance(items[-1], Damage)


def test_messages(tmp_path):
    def fails(path: Path | str, message: str, **options) -> None:
        with pytest.raises(SourceError, match=message) as caught:
            list(open_source(path, **options).chunks(1000, 1000, Folder(tmp_path / "spool")))
        assert "\n" not in str(caught.value)
        assert isinstance(pickle.loads(pickle.dumps(caught.value)), SourceError)

    fails(tmp_path / "no.tar", "does not exist: check the path")
    fails(write(tmp_path / "text.tar", b"no archive"), "is not a tar archive")
    fails(write(tmp_path / "noise.tar", random.Random(0).randbytes(1 << 20)), "is not a tar archive")
    fails(write(tmp_path / "gone.tar", b""), "is an empty archive: no images found")
    fails(write(tmp_path / "cut.tar.gz", gzip.compress(b"x" * 5000)[:15]), "damaged or cut short")
    fails(
        write(tmp_path / "flat.tar", tar_of({"n00000001_5.JPEG": b"1"})), r"name it n00000001\.tar and give its folder"
    )
    fails(
        write(tmp_path / "other.tar", tar_of({f"{i}.txt": b"" for i in range(50)})),
        r"no per-synset tar.*it holds 0\.txt",
    )
    for packed in (bytes, gzip.compress):
        path = write(tmp_path / "other", packed(tar_of({f"{i}.txt": b"" for i in range(50)})))
        fails(path, r"holds no per-synset tar \(n01440764.tar, ...\); it holds 0\.txt", kind="tar-of-tars")
    (tmp_path / "hollow").mkdir()
    fails(tmp_path / "hollow", "is an empty folder: no images found")
    write(tmp_path / "set" / "train" / "dog" / "a.jpg", b"1")
    fails(tmp_path / "set", "named by a WordNet id.*try --source .*train --val-source .*val")
    fails(tmp_path / "set" / "train", "it holds dog: rename the classes")
    write(tmp_path / "above" / "data" / "n00000001" / "a.jpg", b"1")
    fails(tmp_path / "above", r"try --source .*above/data\)")
    write(tmp_path / "beside" / "winter21_whole.tar.gz", b"1")
    fails(tmp_path / "beside", r"try --source .*winter21_whole\.tar\.gz")
    write(tmp_path / "deep" / "Data" / "LOC" / "train" / "n00000001" / "a.jpg", b"1")
    fails(tmp_path / "deep", r"try --source .*deep/Data/LOC\)")
    write(tmp_path / "tars" / "a" / "b" / "n00000001.tar", b"1")
    fails(tmp_path / "tars", r"try --source .*tars/a/b\)")
    write(tmp_path / "one" / "n00000001" / "a.jpg", b"1")
    fails(tmp_path / "one" / "n00000001", "is the folder of one class: give the folder that it lies in")
    (tmp_path / "links" / "train").mkdir(parents=True)
    for folder in (tmp_path / "links", tmp_path / "links" / "train"):
        (folder / "n00000001").symlink_to(tmp_path / "nowhere")
        fails(folder, "1 links of classes that lead nowhere, such as n00000001")
        (folder / "n00000002").mkdir()
        fails(folder, "1 links of classes that lead nowhere, such as n00000001")
        (folder / "n00000002").rmdir()
    for magic, name in OTHER_ARCHIVES.items():
        fails(write(tmp_path / f"x.{name}", magic + bytes(600)), f"is a {name} file.*unpack it first")
    shard = tar_of({"a.jpg": b"1", "a.cls": b"1"})
    fails(write(tmp_path / "wds" / "0.tar", shard), "`python -m data_prep index .*wds`")
    write(tmp_path / "wds" / "1.tar", shard)
    fails(tmp_path / "wds", "`python -m data_prep index .*wds`")
    fails(tmp_path / "set", f"take one of {', '.join(KINDS)}", kind="folders")
    fails(tmp_path / "set", "is a folder, but tar-of-tars is a file", kind="tar-of-tars")
    fails(tmp_path / "text.tar", "is a file, but class-folders is a folder", kind="class-folders")
    fails(tmp_path / "above" / "data", "leave out the labels", labels=tmp_path / "x")
    os.mkfifo(tmp_path / "pipe")
    fails(tmp_path / "pipe", "neither a file nor a folder")


def test_messages_of_a_store(s3_url):
    with pytest.raises(SourceError, match="does not exist"):
        open_source(f"{s3_url}/nothing.tar")
    with pytest.raises(ValueError, match="cannot be opened"):
        open_source("nostore://a/b.tar")


def test_a_file_that_vanishes_is_an_error_not_a_damage(tmp_path):
    chunks = all_chunks(open_source(class_folders(tmp_path)[0]), 1 << 20, Folder(tmp_path))
    shutil.rmtree(tmp_path / "folders")
    with pytest.raises(SourceError, match="does not exist"):
        items_of(chunks)


@pytest.mark.parametrize("form", ["tar", "tar.gz", "tree_tar", "folder_of_tars"])
def test_a_bad_sector_is_a_damage_and_the_rest_is_read(tmp_path, form, monkeypatch):
    path, _, truth, _ = FORMS[form](tmp_path)
    chunks = all_chunks(open_source(path), 3000, Folder(tmp_path / "spool"))

    class Failing(io.FileIO):
        def readinto(self, buffer):
            if self.tell() < 5000 < self.tell() + len(buffer):
                raise OSError(5, "Input/output error")
            return super().readinto(buffer)

    monkeypatch.setattr(gunzip, "LOCAL_BUFFER_BYTES", 512)
    monkeypatch.setattr(FileRange, "_open", lambda self, jumping: io.BufferedReader(Failing(self.path), 512))
    source = open_source(path)
    items = items_of(chunks if source.seekable else all_chunks(source, 3000, Folder(tmp_path / "spool2")))
    found = truth_of(items)
    assert found.items() < truth.items()
    assert len(found) > 0 if form == "tar.gz" else len(found) > len(truth) // 2
    assert any("Input/output error" in item.detail for item in items if isinstance(item, Damage))


@pytest.mark.parametrize("form", FORMS)
def test_sample_census_and_fingerprint(tmp_path, form):
    path, _, truth, _ = FORMS[form](tmp_path)
    source = open_source(f"file://{path}")
    for wanted in (5, 1000):
        sampled = truth_of(list(source.sample(wanted)))
        assert sampled.items() <= truth.items()
        assert len(sampled) >= min(wanted, len(truth) // 2)
        assert sampled == truth_of(list(source.sample(wanted)))
    census = source.census()
    if census.exact:
        estimate = census.estimate_images(len(truth), sum(map(len, truth.values())))
        assert len(truth) * 0.6 < estimate < len(truth) * 2.5  # tiny images: much of a tar of them is its end
        assert census.classes is not None
    copied = tmp_path / "moved"
    shutil.copytree(path, copied) if path.is_dir() else shutil.copyfile(path, copied)
    assert open_source(copied).fingerprint() == source.fingerprint()
    file = next(p for p in sorted(copied.rglob("*") if path.is_dir() else [copied]) if p.is_file() and p.stat().st_size)
    file.write_bytes(bytes([file.read_bytes()[0] ^ 0]) + file.read_bytes()[1:] + b"\0")
    assert open_source(copied).fingerprint() != source.fingerprint()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_memory_stays_flat(tmp_path, pack):
    template = bytearray(tarfile.TarInfo("set/n00000001/000000.JPEG").tobuf(tarfile.USTAR_FORMAT))
    number, blocks = template.index(b"000000.J"), []
    base = sum(template) - sum(template[148:156]) + 8 * 32 - sum(b"000000")
    for i in range(100_000):
        template[number : number + 6] = digits = b"%06d" % i
        template[148:156] = b"%06o\0 " % (base + sum(digits))
        blocks.append(bytes(template))
    path = write(tmp_path / "a.tar", pack(b"".join(blocks)))
    del blocks
    source, spool, count = open_source(path), Folder(tmp_path / "spool"), 0
    process = psutil.Process()
    start = peak = process.memory_info().rss
    for chunk in source.chunks(1 << 20, 5_000, spool):
        count += sum(isinstance(item, Record) for item in chunk.items())
        if chunk.spool:
            spool.remove(chunk.spool)
        peak = max(peak, process.memory_info().rss)
    assert count == 100_000
    assert peak - start < 32 << 20  # tarfile's list of members alone takes three times as much


def test_events_and_name_hash(tmp_path):
    events = list(open_source(tar_of_tars(tmp_path, gzip.compress)[0]).events())
    assert [event.wnid for event in events if isinstance(event, Met)] == [*WNIDS, "n00000007"]
    assert name_hash("a", "b", "c") == name_hash("a", "b", "c") != name_hash("a", "bc", "")
    assert 0 <= name_hash("a", "b", "\udce9") < 1 << 64
