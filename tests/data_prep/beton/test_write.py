"""Shards -> FFCV files, read back by FFCV itself."""

import argparse
import hashlib
import io
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.beton.file import BetonError
from data_prep.beton.sample import BetonSettings
from data_prep.beton.write import add_betons, write_beton
from data_prep.cluster import open_cluster
from data_prep.manifest import BetonEntry, Manifest, ShardEntry, file_sha256
from tests.support.datasets import has_ffcv, needs_ffcv
from tests.support.processes import PATIENCE_SECONDS

RAW = 1  # FFCV's IMAGE_MODES

# A process of its own: numba's threading layers do not stand two loaders in one process.
READ_WITH_LOADER = """
import sys
import numpy as np
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()], "sample": [IntDecoder()]}
loader = Loader(sys.argv[1], batch_size=7, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines,
                drop_last=False)
batches = [[np.array(part) for part in batch] for batch in loader]  # copies: a batch is a ring buffer
images, labels, samples = (np.concatenate(parts) for parts in zip(*batches))
np.savez(sys.argv[2], images=images, labels=labels[:, 0], samples=samples[:, 0])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beton")
    rng = np.random.default_rng(0)
    for wnid in ("n00000001", "n00000002", "n00000003"):
        (folder / "source" / wnid).mkdir(parents=True)
        for i in range(9):
            small = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
            small.resize((60, 48), Image.Resampling.BICUBIC).save(folder / "source" / wnid / f"{wnid}_{i}.jpg")
    arguments = ["shard", "--source", str(folder / "source"), "--output", str(folder / "out"), "--workers", "1"]
    arguments += ["--val-per-class", "2", "--samples-per-shard", "8", "--format"]
    assert main([*arguments, "webdataset"]) == 0
    if has_ffcv():
        assert main([*arguments, "both"]) == 0
    return folder / "out", arguments


def samples_of(folder, manifest, split):
    for entry in manifest.split(split).shards:
        index, raw = manifest.load_index(folder, entry), (folder / entry.file).read_bytes()
        for offset, size, label in zip(index.offsets, index.sizes, index.labels, strict=True):
            yield raw[offset : offset + size], int(label)


@needs_ffcv
def test_betons_hold_the_shards_samples_in_the_shards_order(built):
    from ffcv.reader import Reader

    folder, _ = built
    manifest = Manifest.load(folder)
    for split in ("train", "val"):
        (entry,) = manifest.split(split).betons
        data = (folder / entry.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)
        assert (entry.max_width, entry.max_height) == (60, 48)
        reader = Reader(str(folder / entry.file))
        expected = list(samples_of(folder, manifest, split))
        assert reader.num_samples == entry.samples == manifest.split(split).samples == len(expected)
        for i, (jpeg, label) in enumerate(expected):
            row = reader.metadata[i]
            start = int(row["f0"]["data_ptr"])
            assert data[start : start + len(jpeg)] == jpeg
            assert (int(row["f1"]), int(row["f2"])) == (label, i)


@needs_ffcv
def test_ffcvs_loader_gives_the_same_images_labels_and_ids(built, tmp_path):
    folder, _ = built
    read = read_with_loader(folder / "train.beton", tmp_path / "read.npz")
    expected = list(samples_of(folder, Manifest.load(folder), "train"))
    assert read["samples"].tolist() == list(range(21))
    assert read["labels"].tolist() == [label for _, label in expected]
    for image, (jpeg, _) in zip(read["images"], expected, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
        assert abs(image.astype(int) - pixels).mean() < 3  # FFCV takes libjpeg-turbo's faster upsampling


def copy_of(built, folder, settings=None, cluster=None):
    """The shards of the module's data set, with betons of other settings; returns its manifest."""
    shutil.copytree(built[0], folder, ignore=shutil.ignore_patterns("*.beton"), dirs_exist_ok=True)
    manifest = without_betons(Manifest.load(folder))
    manifest.save(folder)
    return manifest if settings is None else add_betons(folder, manifest, settings, cluster)


def without_betons(manifest):
    splits = {name: split.model_copy(update={"betons": []}) for name, split in manifest.splits.items()}
    return manifest.model_copy(update={"splits": splits})


def read_with_loader(beton, out):
    command = [sys.executable, "-c", READ_WITH_LOADER, str(beton), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert run.returncode == 0, run.stderr
    return np.load(out)


@needs_ffcv
@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        (BetonSettings("raw", max_side_px=30), {1}),
        (BetonSettings("proportion", jpeg_probability=0.4), {0, 1}),
        (BetonSettings("jpg", max_side_px=30), {0}),
    ],
    ids=str,
)
def test_ffcvs_loader_reads_what_each_mode_stores(built, tmp_path, settings, modes):
    from ffcv.reader import Reader

    manifest = copy_of(built, tmp_path / "data", settings)
    (entry,) = manifest.split("train").betons
    side = (30, 24) if settings.max_side_px else (60, 48)
    assert (entry.write_mode, entry.settings) == (settings.mode, settings.described())
    assert (entry.max_width, entry.max_height) == side
    mode = Reader(str(tmp_path / "data" / "train.beton")).metadata["f0"]["mode"]
    assert set(mode.tolist()) == modes
    read = read_with_loader(tmp_path / "data" / "train.beton", tmp_path / "read.npz")
    expected = list(samples_of(tmp_path / "data", manifest, "train"))
    assert read["labels"].tolist() == [label for _, label in expected]
    assert read["samples"].tolist() == list(range(21))
    for image, (jpeg, _), this in zip(read["images"], expected, mode, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(jpeg)).resize(side, Image.Resampling.BICUBIC))
        difference = abs(image.astype(int) - pixels)
        assert difference.max() == 0 if this == RAW else difference.mean() < 10  # others: some 60


@needs_ffcv
def test_the_files_are_those_of_ffcvs_own_writer(built, tmp_path):
    """With an encode that only copies, as the shards' JPEGs are, FFCV lays out the same bytes."""
    from types import MethodType

    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    def store(field, destination, image, malloc):
        destination["mode"], destination["width"], destination["height"] = 0, 60, 48
        destination["data_ptr"], storage = malloc(len(image))
        storage[:] = np.frombuffer(image, dtype=np.uint8)

    image_field = RGBImageField()
    image_field.encode = MethodType(store, image_field)
    folder, _ = built
    samples = [(jpeg, label, i) for i, (jpeg, label) in enumerate(samples_of(folder, Manifest.load(folder), "train"))]
    fields = {"image": image_field, "label": IntField(), "sample": IntField()}
    DatasetWriter(str(tmp_path / "ffcv.beton"), fields, num_workers=1).from_indexed_dataset(samples)
    assert file_sha256(tmp_path / "ffcv.beton") == file_sha256(folder / "train.beton")


@needs_ffcv
def test_workers_change_nothing_and_their_errors_arrive(built, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.beton.write.RANGE_SAMPLES", 3)  # several ranges a shard
    monkeypatch.setattr("data_prep.beton.write.RANGES_PER_SLOT", 2)  # and several groups
    settings = BetonSettings("proportion", max_side_px=40)
    alone = copy_of(built, tmp_path / "alone", settings)
    for path in tmp_path.joinpath("alone").iterdir():
        assert ".tmp-" not in path.name
    two = argparse.Namespace(workers=2, scheduler=None, slurm_jobs=None, slurm_option=[])
    with open_cluster(two) as cluster:
        together = copy_of(built, tmp_path / "together", settings, cluster)
        assert together == alone  # with the sha256 of both files
        names = {path.name for path in (tmp_path / "together").iterdir()}
        assert names == {path.name for path in (tmp_path / "alone").iterdir()}
        manifest = make_gray(tmp_path / "together", together)
        with pytest.raises(BetonError, match=r"val-000000\.tar: n0000000.* is not an RGB JPEG"):
            write_beton(tmp_path / "together", manifest, "val", settings, cluster)
        assert names == {path.name for path in (tmp_path / "together").iterdir()}


def make_gray(folder, manifest):
    """Replace the first validation image by one of gray of the same size; the manifest fits the file."""
    entry = manifest.split("val").shards[0]
    index, path = manifest.load_index(folder, entry), folder / entry.file
    gray = io.BytesIO()
    Image.new("L", (8, 8)).save(gray, "JPEG", optimize=True)
    size, offset = int(index.sizes[0]), int(index.offsets[0])
    data = bytearray(path.read_bytes())
    assert len(gray.getvalue()) <= size
    data[offset : offset + size] = gray.getvalue().ljust(size, b"\0")
    path.write_bytes(data)
    split = manifest.split("val")
    split = split.model_copy(update={"shards": [entry.model_copy(update={"sha256": file_sha256(path)})]})
    return manifest.model_copy(update={"splits": {**manifest.splits, "val": split}})


@needs_ffcv
def test_images_that_fit_keep_their_bytes(built, tmp_path):
    manifest = copy_of(built, tmp_path, BetonSettings(max_side_px=60, quality=5))
    assert manifest.split("val").betons[0].sha256 == Manifest.load(built[0]).split("val").betons[0].sha256


@needs_ffcv
def test_other_settings_replace_the_file_and_say_so(built, tmp_path, capsys):
    raw = copy_of(built, tmp_path, BetonSettings("raw"))
    capsys.readouterr()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.beton")}
    assert add_betons(tmp_path, raw, BetonSettings("raw", quality=50)) == raw  # quality does not matter to pixels
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.beton")}
    jpg = add_betons(tmp_path, raw)
    assert "train.beton has mode=raw: it is written anew with mode=jpg" in capsys.readouterr().err
    assert Manifest.load(tmp_path) == jpg == Manifest.load(built[0])
    (tmp_path / "val.beton").unlink()
    assert add_betons(tmp_path, jpg) == jpg
    assert (tmp_path / "val.beton").is_file()


def test_a_beton_from_before_there_were_settings_is_one_of_jpegs():
    shard = ShardEntry(file="a.beton", samples=1, bytes=1, sha256="0" * 64)
    old = BetonEntry(**shard.model_dump(), page_size_bytes=1 << 23, max_height=3, max_width=4)
    assert BetonSettings.of(old) == BetonSettings()
    with pytest.raises(BetonError, match="unknown settings"):
        BetonSettings.of(old.model_copy(update={"settings": {"colours": 2}}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "smart"}, "'smart' is not one of jpg, proportion, raw"),
        ({"max_side_px": -1}, r"resolution -1 is not in 0\.\.65535"),
        ({"jpeg_probability": 1.5}, r"1\.5 is not in 0\.\.1"),
        ({"quality": 96}, r"96 is not in 1\.\.95"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(BetonError, match=message):
        BetonSettings(**wrong)


@pytest.mark.parametrize("url", ["s3://bucket/data", Path("s3://bucket/data")])
def test_a_url_is_refused(built, url):
    with pytest.raises(BetonError, match=r"not a local folder.*--format webdataset"):
        add_betons(url, without_betons(Manifest.load(built[0])))


@needs_ffcv
def test_a_full_disk_is_seen_before_the_first_byte(built, tmp_path, monkeypatch):
    manifest = copy_of(built, tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 0, 17_000_000))  # two pages of 8 MiB are more
    with pytest.raises(BetonError, match=r"train\.beton needs about 0\.02 GB, .* has 0\.02 GB free: make room"):
        add_betons(tmp_path, manifest, BetonSettings("raw"))
    assert not list(tmp_path.glob("*beton*")) + list(tmp_path.glob(".*"))


@needs_ffcv
def test_a_second_run_writes_nothing_and_the_bytes_repeat(built, capsys):
    folder, arguments = built
    before = (folder / "train.beton").stat().st_mtime_ns
    assert main([*arguments, "ffcv"]) == 0
    assert "already built" in capsys.readouterr().out
    assert (folder / "train.beton").stat().st_mtime_ns == before
    manifest = Manifest.load(folder)
    assert [write_beton(folder, manifest, "val")] == manifest.split("val").betons


@needs_ffcv
def test_a_changed_shard_is_refused_and_leaves_no_file(built, tmp_path):
    folder, _ = built
    for path in folder.glob("val*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "val.beton").unlink()
    manifest = Manifest.load(folder)
    shard = tmp_path / "val-000000.tar"
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BetonError, match=r"val-000000\.tar is not the file dataset\.json describes"):
        write_beton(tmp_path, manifest, "val")
    shard.unlink()
    with pytest.raises(BetonError, match=r"val-000000\.tar is missing"):
        write_beton(tmp_path, manifest, "val")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["val-000000.index.npz"]


def test_without_ffcv_the_message_says_how_to_get_it(built, tmp_path, monkeypatch, capsys):
    _, arguments = built
    monkeypatch.setitem(sys.modules, "ffcv.reader", None)  # makes `import ffcv.reader` raise ImportError
    monkeypatch.setitem(sys.modules, "ffcv", None)
    arguments = [*arguments[:4], str(tmp_path / "out"), "--format", "both"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: FFCV cannot be imported")
    assert "make setup" in error
    assert not (tmp_path / "out").exists()
