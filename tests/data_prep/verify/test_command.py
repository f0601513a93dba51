"""Damage of every kind, planted into a whole data set: each is found, and named by its file."""

import contextlib
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.__main__ import main
from data_prep.cluster import InProcess
from data_prep.manifest import Manifest, ManifestError, ShardIndex, file_sha256
from data_prep.shards.info import info_bytes
from data_prep.verify.command import verify_dataset
from data_prep.verify.problems import Problems
from tests.support.archives import archive, dirt, shard
from tests.support.datasets import has_ffcv, needs_ffcv

SHARD, INDEX = "train-000001.tar", "train-000001.index.npz"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    extra = {name: data for name, (data, _, _) in dirt().items()}
    source = archive(folder / "source.tar", extra=extra)
    options = ["--val-per-class", "2", "--max-reject", "1", "--format", "both" if has_ffcv() else "webdataset"]
    assert shard(source, folder / "data", *options) == 0
    return folder / "data"


@pytest.fixture
def data(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def found(folder, *, fast=False, shards_only=False) -> dict[str, list[str]]:
    """File -> what is wrong with it; `shards_only`: without FFCV's files, which damaged shards do not fit either."""
    report: dict[str, list[str]] = {}
    for problem in verify_dataset(folder, InProcess(), fast=fast).problems:
        if not (shards_only and problem.file.endswith(".beton")):
            report.setdefault(problem.file, []).append(problem.text)
    return report


def flip(path: Path, offset: int, bits: int = 0xFF) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ bits]))


def members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def edit_manifest(folder: Path, edit) -> None:
    raw = json.loads((folder / "dataset.json").read_text())
    edit(raw)
    (folder / "dataset.json").write_text(json.dumps(raw))
    with contextlib.suppress(ManifestError):
        (folder / "_info.json").write_bytes(info_bytes(Manifest.load(folder)))


def shard_entry(raw: dict, file: str = SHARD) -> dict:
    return next(entry for split in raw["splits"].values() for entry in split["shards"] if entry["file"] == file)


def rehash(folder: Path, file: str = SHARD) -> None:
    """Let the manifest say what the shard is now."""
    now = {"sha256": file_sha256(folder / file), "bytes": (folder / file).stat().st_size}
    edit_manifest(folder, lambda raw: shard_entry(raw, file).update(now))


def test_a_whole_data_set(whole, capsys):
    manifest = Manifest.load(whole)
    report = verify_dataset(whole, InProcess())
    assert (report.problems, report.notes) == ([], [])
    assert report.samples == sum(split.samples for split in manifest.splits.values()) > 40
    assert (report.splits, report.betons) == (2, 2 if has_ffcv() else 0)
    assert verify_dataset(whole, InProcess(), fast=True).samples == report.samples
    assert main(["verify", str(whole), "--workers", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{whole} is whole: 2 splits, ")
    assert f"{report.samples} samples (decoded)" in lines[0]


def test_a_flipped_byte_of_an_image(data):
    jpeg = members(data / SHARD)[6]
    flip(data / SHARD, jpeg.offset_data + jpeg.size - 40)
    problems = found(data)
    assert "differs from its sha256" in problems[SHARD][0]
    if has_ffcv():
        assert problems.pop("train.beton") == [f"{jpeg.name[:-4]} has other bytes than in the shard"]
    assert set(problems) == {SHARD}
    assert found(data, fast=True) == {}


def test_a_flipped_byte_of_a_tar_header(data):
    jpeg, number, described = members(data / SHARD)[6:9]
    flip(data / SHARD, jpeg.offset + 3)
    problems = found(data)
    assert f"has a damaged tar header at byte {jpeg.offset}" in problems[SHARD]
    assert f"{number.name} stands without its image" in problems[SHARD]
    assert f"{described.name} stands without its image" in problems[SHARD]
    assert "holds 9 whole samples, dataset.json says 10" in problems[SHARD]
    assert problems[INDEX] == [f"{jpeg.name[:-4]} is listed, but not in the shard"]
    assert not any("decoded" in text for text in problems[SHARD])


def test_the_last_header_and_the_end_of_a_tar(data):
    last = members(data / SHARD)[-1]
    flip(data / SHARD, last.offset + 3)
    assert f"has a damaged tar header at byte {last.offset}, the rest is no tar" in found(data)[SHARD]


def test_a_missing_shard(data):
    (data / SHARD).unlink()
    for fast in (False, True):
        assert found(data, fast=fast)[SHARD] == ["is missing"]


def test_a_missing_index(data):
    (data / INDEX).unlink()
    assert found(data) == {INDEX: ["is missing"]}
    (data / INDEX).write_bytes(b"not an index")
    assert "is damaged" in found(data, fast=True)[INDEX][0]


def test_a_truncated_shard(data):
    jpeg = members(data / SHARD)[15]
    with open(data / SHARD, "r+b") as file:
        file.truncate(jpeg.offset_data + 100)
    problems = found(data, shards_only=True)
    assert "dataset.json says" in problems[SHARD][0]
    assert any("is not a whole tar: unexpected end of data" in text for text in problems[SHARD])
    assert "holds 5 whole samples, dataset.json says 10" in problems[SHARD]
    assert len(problems[INDEX]) == 5
    assert list(found(data, fast=True)) == [SHARD]


def test_a_wrong_count(data):
    def one_more(raw):
        split = raw["splits"]["train"]
        shard_entry(raw)["samples"] += 1
        split["samples"] += 1
        split["class_counts"][0] += 1
        for beton in split["betons"]:
            beton["samples"] += 1

    edit_manifest(data, one_more)
    count = Manifest.load(data).split("train").class_counts[0]
    problems = found(data)
    assert problems[SHARD] == ["holds 10 whole samples, dataset.json says 11"]
    assert problems[INDEX] == ["lists 10 samples, dataset.json says 11"]
    wanted = f"n00000001 has {count} ({count - 1} in the shards) in class_counts of train"
    assert problems["dataset.json"] == [f"{wanted}, which the shards do not hold"]
    assert f"has 10 rows for {SHARD}, dataset.json says 11 samples" in problems["ledger.parquet"]
    assert set(found(data, fast=True)) == {"dataset.json", INDEX, "ledger.parquet"}


def test_swapped_labels_of_an_index(data):
    index = ShardIndex.load(data / INDEX)
    one, other = (int(np.flatnonzero(index.labels == label)[0]) for label in np.unique(index.labels)[:2])
    labels = index.labels.copy()
    labels[[one, other]] = labels[[other, one]]
    ShardIndex(index.keys, index.offsets, index.sizes, labels).save(data / INDEX)
    texts = found(data, shards_only=True)[INDEX]
    assert sorted(text.split()[0] for text in texts) == sorted([index.keys[one], index.keys[other]])
    assert all("its JSON says" in text for text in texts)


def test_moved_offsets_and_order_of_an_index(data):
    index = ShardIndex.load(data / INDEX)
    ShardIndex(index.keys, index.offsets + 1, index.sizes, index.labels).save(data / INDEX)
    texts = found(data, shards_only=True)[INDEX]
    assert len(texts) == 10
    assert texts[0] == f"{index.keys[0]} lies elsewhere in the shard than listed"
    ShardIndex(*(getattr(index, name)[::-1] for name in ("keys", "offsets", "sizes", "labels"))).save(data / INDEX)
    assert "lists the samples in another order than the shard" in found(data, shards_only=True)[INDEX]
    assert "not in the order of the shard" in found(data, fast=True)[INDEX][0]


def test_stray_files(data):
    shutil.copy(data / SHARD, data / "train-000099.tar")
    shutil.copy(data / INDEX, data / "train-000099.index.npz")
    (data / "notes.txt").write_text("not ours")
    for fast in (False, True):
        problems = found(data, fast=fast)
        assert set(problems) == {"train-000099.tar", "train-000099.index.npz"}
        assert "not listed in dataset.json" in problems["train-000099.tar"][0]


def test_images_and_jsons_that_do_not_fit(data):
    (cut, _, _, _, _, wrong, gray, number, _) = members(data / SHARD)[:9]
    raw = bytearray((data / SHARD).read_bytes())
    middle = cut.offset_data + cut.size // 2
    raw[middle : cut.offset_data + cut.size] = bytes(cut.offset_data + cut.size - middle)
    described = raw[wrong.offset_data : wrong.offset_data + wrong.size]
    said = json.loads(described)
    label, width = said["label"], said["width"]
    described = described.replace(b'"width": %d' % width, b'"width": %d' % (width + 1))
    described = described.replace(b'"label": %d' % label, b'"label": %d' % ((label + 1) % 3))
    raw[wrong.offset_data : wrong.offset_data + wrong.size] = described
    raw[gray.offset_data : gray.offset_data + 2] = b"no"
    raw[number.offset_data : number.offset_data + 1] = b"7"
    (data / SHARD).write_bytes(raw)
    rehash(data)
    texts = found(data, shards_only=True)[SHARD]
    assert len(texts) == 6
    for start in (f"{cut.name} cannot be decoded", f"{gray.name} cannot be decoded"):
        assert any(text.startswith(start) for text in texts)
    assert any(text.startswith(f"{wrong.name} says {width + 1} x ") for text in texts)
    assert any(text.startswith(f"{wrong.name} has wnid {said['wnid']}, label ") for text in texts)
    assert f"{wrong.name[:-5]}.cls says '{label}', its JSON {(label + 1) % 3}" in texts
    assert any(text.startswith(f"{number.name} says '7', its JSON ") for text in texts)


def test_a_key_that_stands_in_both_splits(data):
    """The same shard in train and val, all else consistent."""

    def twice(raw):
        entry = shard_entry(raw)
        labels = ShardIndex.load(data / INDEX).labels
        split = raw["splits"]["val"]
        split["shards"].append({**entry, "file": "val-000001.tar"})
        split["samples"] += entry["samples"]
        split["class_counts"] = (np.array(split["class_counts"]) + np.bincount(labels, minlength=3)).tolist()
        split["betons"] = []

    shutil.copy(data / SHARD, data / "val-000001.tar")
    shutil.copy(data / INDEX, data / "val-000001.index.npz")
    (data / "val.beton").unlink(missing_ok=True)
    edit_manifest(data, twice)
    key = ShardIndex.load(data / INDEX).keys[0]
    for fast in (False, True):
        problems = found(data, fast=fast)
        assert set(problems) == {SHARD, "ledger.parquet"}
        assert f"key {key} stands in {SHARD} and val-000001.tar" in problems[SHARD]
        assert len(problems[SHARD]) == 10


def test_a_ledger_that_does_not_fit(data):
    table = pq.read_table(data / "ledger.parquet")
    row = table.column("shard").to_pylist().index(SHARD)
    pq.write_table(table.slice(0, row).take(list(range(row))), data / "ledger.parquet")
    assert any(SHARD in text and "says 10 samples" in text for text in found(data)["ledger.parquet"])
    (data / "ledger.parquet").write_bytes(b"PAR1 no")
    assert "cannot be read" in found(data, fast=True)["ledger.parquet"][0]
    (data / "ledger.parquet").unlink()
    report = verify_dataset(data, InProcess(), fast=True)
    assert not report.problems
    assert "no ledger.parquet" in report.notes[0]


def test_many_problems_of_a_kind_are_told_once():
    problems = Problems()
    for number in range(1000):
        problems.add("a.tar", f"has label {number}", f"key{number}")
    assert len(problems.listed()) == 21
    assert problems.listed()[-1].text == "and 980 more: ... has label #"


def test_no_manifest_or_an_invalid_one(data, tmp_path, capsys):
    edit_manifest(data, lambda raw: raw["splits"]["train"].update(samples=1))
    assert "add up to" in found(data)["dataset.json"][0]
    assert main(["verify", str(tmp_path / "nowhere"), "--workers", "1"]) == 1
    assert "does not exist" in capsys.readouterr().out


@needs_ffcv
def test_damaged_betons(data):
    from ffcv.reader import Reader

    reader = Reader(str(data / "train.beton"))
    key = ShardIndex.load(data / "train-000000.index.npz").keys[3]
    flip(data / "train.beton", int(reader.metadata["f0"]["data_ptr"][3]) + 50)
    sample, checksum = found(data)["train.beton"]
    assert "differs from its sha256" in checksum
    assert sample == f"{key} has other bytes than in the shard"
    rows = (data / "train.beton").read_bytes().index(reader.metadata.tobytes())
    flip(data / "train.beton", rows + reader.metadata.dtype.fields["f1"][1], 1)  # label of the first sample
    assert "does not fit train-000000.tar in labels" in found(data)["train.beton"]
    with open(data / "train.beton", "r+b") as file:
        file.truncate(1000)
    assert any("is not a whole FFCV file" in text for text in found(data)["train.beton"])
    (data / "train.beton").unlink()
    for fast in (False, True):
        assert found(data, fast=fast) == {"train.beton": ["is missing"]}


@needs_ffcv
def test_betons_of_other_modes(data):
    from ffcv.reader import Reader

    from data_prep.beton.sample import BetonSettings
    from data_prep.beton.write import add_betons

    manifest = add_betons(data, Manifest.load(data), BetonSettings("proportion", max_side_px=40))
    assert found(data) == {}
    metadata = Reader(str(data / "train.beton")).metadata["f0"]
    raw = int(np.flatnonzero(metadata["mode"] == 1)[0])
    keys = np.concatenate([manifest.load_index(data, entry).keys for entry in manifest.split("train").shards])
    flip(data / "train.beton", int(metadata["data_ptr"][raw]) + 9, 0x80)
    assert f"{keys[raw]} has other pixels than in the shard" in found(data)["train.beton"]


def test_several_workers_give_the_same_list(data, capsys):
    flip(data / SHARD, members(data / SHARD)[6].offset + 3)
    (data / "val-000000.tar").unlink()
    listed = []
    for workers in "12":
        assert main(["verify", str(data), "--workers", workers]) == 1
        *problems, note, summary = capsys.readouterr().out.splitlines()
        assert note == "note: class_counts of val were not checked: some of its samples cannot be read"
        assert summary.startswith(f"{data} is NOT whole: {len(problems)} problem(s) in ")
        listed.append(problems)
    assert listed[0] == listed[1]
    assert "val-000000.tar: is missing" in listed[0]


def test_on_an_object_store(data, s3, capsys):
    def upload(path: Path) -> None:
        s3.put(f"sets/{path.name}", path.read_bytes())

    url = "s3://bucket/sets"
    manifest = Manifest.load(data)  # FFCV's files are local ones
    for split in manifest.splits.values():
        split.betons.clear()
    manifest.save(data)
    for path in data.iterdir():
        if path.suffix != ".beton":
            upload(path)
    assert main(["verify", url, "--workers", "1"]) == 0
    assert main(["verify", url, "--workers", "1", "--fast"]) == 0
    flip(data / SHARD, members(data / SHARD)[6].offset + 3)
    upload(data / SHARD)
    s3.client.delete_object(Bucket="bucket", Key="sets/val-000000.index.npz")
    s3.put("sets/train-000099.tar", b"x")
    capsys.readouterr()
    assert main(["verify", url, "--workers", "1"]) == 1
    told = capsys.readouterr().out
    for line in (
        f"{SHARD}: has a damaged tar header at byte",
        "val-000000.index.npz: is missing",
        "train-000099.tar: is not listed",
    ):
        assert line in told
