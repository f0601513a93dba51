"""Shards -> FFCV files, read back by FFCV itself."""

import hashlib
import importlib.util
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.beton import BetonError, write_beton
from data_prep.manifest import Manifest

needs_ffcv = pytest.mark.skipif(
    importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed (`make setup` says what it needs)"
)

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
    if importlib.util.find_spec("ffcv"):
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
    out = tmp_path / "read.npz"
    command = [sys.executable, "-c", READ_WITH_LOADER, str(folder / "train.beton"), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    read = np.load(out)
    expected = list(samples_of(folder, Manifest.load(folder), "train"))
    assert read["samples"].tolist() == list(range(21))
    assert read["labels"].tolist() == [label for _, label in expected]
    for image, (jpeg, _) in zip(read["images"], expected, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
        assert abs(image.astype(int) - pixels).mean() < 3  # FFCV takes libjpeg-turbo's faster upsampling


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
