"""Archive -> shards: contents, determinism, dirt, interruptions, messages."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.images import ImagePolicy, ImageRejected, jpeg_frame, prepare_image
from data_prep.manifest import (
    Manifest,
    ManifestError,
)
from data_prep.sources import Source, SourceError, limit_per_class

WNIDS = ("n00000003", "n00000001", "n00000002")  # not sorted in the archive; labels are by sorted id
ROOT = Path(__file__).parents[1]


def image_bytes(seed: int, size=(40, 30), mode="RGB", fmt="JPEG", **options) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert(mode).save(file, fmt, **options)
    return file.getvalue()


def tar_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def class_images(wnid: str, count: int) -> dict[str, bytes]:
    start = int(wnid[1:]) * 1000
    return {
        f"{wnid}_{i}.JPEG": image_bytes(start + i, size=(120, 90) if i % 5 == 0 else (40, 30)) for i in range(count)
    }


def archive(path: Path, count: int = 12, extra: dict[str, bytes] | None = None) -> Path:
    classes = {wnid: class_images(wnid, count) for wnid in WNIDS}
    classes[WNIDS[0]].update(extra or {})
    path.write_bytes(tar_bytes({f"{wnid}.tar": tar_bytes(images) for wnid, images in classes.items()}))
    return path


def shard(source: Path, output: Path, *options: str) -> int:
    return main(
        [
            *("shard", "--source", str(source), "--output", str(output), "--short-side", "64", "--name", "t"),
            *("--samples-per-shard", "10", "--workers", "1", *options),
        ]
    )


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    assert shard(archive(folder / "source.tar"), folder / "out", "--val-per-class", "2") == 0
    return folder / "out"


def test_manifest_describes_the_folder(built):
    manifest = Manifest.load(built)
    assert manifest.synsets == sorted(WNIDS)
    assert manifest.num_classes == 3
    assert manifest.split("train").class_counts == [10, 10, 10]
    assert manifest.split("val").class_counts == [2, 2, 2]
    assert [entry.samples for entry in manifest.split("train").shards] == [10, 10, 10]
    for split in manifest.splits.values():
        for entry in split.shards:
            data = (built / entry.file).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)
    with pytest.raises(ManifestError, match="no split 'test'; it has train, val"):
        manifest.split("test")


def test_shards_are_what_webdataset_reads_and_the_index_seeks(built):
    import webdataset

    manifest = Manifest.load(built)
    keys, originals = [], {name: data for wnid in WNIDS for name, data in class_images(wnid, 12).items()}
    for split in manifest.splits.values():
        for entry in split.shards:
            index = manifest.load_index(built, entry)
            samples = list(webdataset.WebDataset(str(built / entry.file), shardshuffle=False))
            assert [s["__key__"] for s in samples] == index.keys.tolist()
            raw = (built / entry.file).read_bytes()
            for i, sample in enumerate(samples):
                about = json.loads(sample["json"])
                offset, size = int(index.offsets[i]), int(index.sizes[i])
                assert raw[offset : offset + size] == sample["jpg"]
                assert manifest.synsets[index.labels[i]] == about["wnid"] == sample["__key__"][:9]
                image = Image.open(io.BytesIO(sample["jpg"]))
                image.load()
                assert image.size == (about["width"], about["height"])
                if about["reencoded"]:
                    assert image.size == (85, 64)
                else:
                    assert sample["jpg"] == originals[about["source_name"]]  # passed byte for byte
                keys.append(sample["__key__"])
    assert len(set(keys)) == len(keys) == len(originals)


def test_shards_are_shuffled(built):
    manifest = Manifest.load(built)
    labels = np.concatenate([manifest.load_index(built, e).labels for e in manifest.split("train").shards])
    assert (np.diff(labels) != 0).sum() > 8  # 2 if the classes came one after another


def test_the_same_bytes_for_any_number_of_workers_and_any_kind_of_source(built, tmp_path):
    source = archive(tmp_path / "source.tar")
    assert shard(source, tmp_path / "two", "--val-per-class", "2", "--workers", "2") == 0
    assert digests(tmp_path / "two") == digests(built)
    for wnid in WNIDS:
        (tmp_path / "classes" / wnid).mkdir(parents=True)
        for name, data in class_images(wnid, 12).items():
            (tmp_path / "classes" / wnid / name).write_bytes(data)
    (tmp_path / "tars").mkdir()
    for wnid in WNIDS:
        (tmp_path / "tars" / f"{wnid}.tar").write_bytes(tar_bytes(class_images(wnid, 12)))
    for kind in ("classes", "tars"):
        assert shard(tmp_path / kind, tmp_path / f"from-{kind}", "--val-per-class", "2") == 0
        ours = digests(tmp_path / f"from-{kind}")
        assert {k: v for k, v in ours.items() if k != "dataset.json"} == {
            k: v for k, v in digests(built).items() if k != "dataset.json"
        }
        assert Manifest.load(tmp_path / f"from-{kind}").dataset_id == Manifest.load(built).dataset_id


def test_gzipped_archive_and_limit(tmp_path):
    import gzip

    source = archive(tmp_path / "source.tar")
    zipped = tmp_path / "source.tar.gz"
    zipped.write_bytes(gzip.compress(source.read_bytes()))
    assert shard(zipped, tmp_path / "out", "--max-images-per-class", "4") == 0
    assert Manifest.load(tmp_path / "out").split("train").class_counts == [4, 4, 4]
    records = list(Source(zipped))
    assert [r.name for r in limit_per_class(records, 100)] == [r.name for r in records]


def test_separate_validation_source(tmp_path, capsys):
    train = archive(tmp_path / "train.tar")
    val = tmp_path / "val.tar"
    members = {f"{w}.tar": tar_bytes(class_images(w, 3)) for w in ("n00000001", "n00000009")}
    val.write_bytes(tar_bytes(members))
    assert shard(train, tmp_path / "out", "--val-source", str(val)) == 0
    assert Manifest.load(tmp_path / "out").split("val").class_counts == [3, 0, 0]
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {(r["split"], r["wnid"], r["reason"]) for r in rejected} == {
        ("val", "n00000009", "its class is not in the training source")
    }
    assert "3 x its class is not in the training source" in capsys.readouterr().out


def test_val_per_class_leaves_half_of_a_class(tmp_path, capsys):
    assert shard(archive(tmp_path / "s.tar", count=5), tmp_path / "out", "--val-per-class", "4") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.split("train").class_counts == [3, 3, 3]
    assert manifest.split("val").class_counts == [2, 2, 2]
    assert "3 classes gave less than 4 validation images" in capsys.readouterr().out


def test_dirt_is_rejected_and_listed(tmp_path, capsys):
    whole = image_bytes(1, size=(200, 150))
    dirt = {
        "cut.JPEG": whole[: len(whole) // 2],
        "empty.JPEG": b"",
        "page.JPEG": b"<html>not found</html>",
        "dots.in.name.JPEG": image_bytes(2),
        "dots_in_name.JPEG": image_bytes(3),  # the same key, were it not for the check
        "x" * 120 + ".JPEG": image_bytes(4),
    }
    assert shard(archive(tmp_path / "s.tar", extra=dirt), tmp_path / "out") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.split("train").class_counts == [12, 12, 15]
    rejected = {r["name"]: r["reason"] for r in map(json.loads, (tmp_path / "out" / "rejected.jsonl").open())}
    assert rejected.keys() == {"cut.JPEG", "empty.JPEG", "page.JPEG"}
    assert "truncated" in rejected["cut.JPEG"]
    keys = np.concatenate([manifest.load_index(tmp_path / "out", e).keys for e in manifest.split("train").shards])
    assert len(set(keys)) == 39
    assert not any("." in key for key in keys)
    assert "1 x empty file (such as n00000003 empty.JPEG)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "fmt"),
    [
        *(("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("L", "JPEG"), ("CMYK", "JPEG")),
        *(("RGB", "WEBP"), ("1", "PNG"), ("RGB", "BMP"), ("I;16", "PNG")),
    ],
)
def test_every_mode_becomes_a_small_rgb_jpeg(mode, fmt):
    if mode == "I;16":
        file = io.BytesIO()
        Image.fromarray(np.full((90, 120), 32768, np.uint16)).save(file, fmt)
        data = file.getvalue()
    else:
        data = image_bytes(5, size=(120, 90), mode=mode, fmt=fmt)
    out = prepare_image(data, ImagePolicy(short_side_px=45))
    image = Image.open(io.BytesIO(out.jpeg))
    assert (image.mode, image.format, image.size) == ("RGB", "JPEG", (60, 45))
    assert (out.width, out.height, out.source_width, out.source_height, out.reencoded) == (60, 45, 120, 90, True)
    frame = jpeg_frame(out.jpeg)
    assert frame == (0xC0, 60, 45, 3)
    if mode == "I;16":
        assert abs(int(np.asarray(image).mean()) - 128) <= 1


def test_transparency_becomes_white_and_progressive_is_encoded_anew():
    file = io.BytesIO()
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(file, "PNG")
    out = prepare_image(file.getvalue(), ImagePolicy())
    assert np.asarray(Image.open(io.BytesIO(out.jpeg))).min() >= 254
    assert prepare_image(image_bytes(1, progressive=True), ImagePolicy()).reencoded
    assert prepare_image(image_bytes(1), ImagePolicy()).jpeg == image_bytes(1)
    with pytest.raises(ImageRejected, match="pixels, more than"):
        prepare_image(image_bytes(1, size=(10_000, 9_000), mode="1", fmt="PNG"), ImagePolicy())


def test_rerun_finds_the_finished_build(tmp_path, capsys):
    source, out = archive(tmp_path / "s.tar"), tmp_path / "out"
    assert shard(source, out) == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    source = source.rename(tmp_path / "moved.tar")
    assert shard(source, out, "--workers", "2") == 0
    assert "already built" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}

    assert shard(source, out, "--seed", "1") == 1
    assert "seed (0 there, 1 now): give --force" in capsys.readouterr().err
    other = archive(tmp_path / "other.tar", count=4)
    assert shard(other, out) == 1
    assert "built with other settings: source (" in capsys.readouterr().err
    (out / "train-000001.tar").unlink()
    assert shard(source, out) == 1
    assert "train-000001.tar or its index is missing" in capsys.readouterr().err

    assert shard(other, out, "--force") == 0
    assert sorted(p.name for p in out.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]


def one_error_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_errors_are_one_line_and_exit_code_1(tmp_path, capsys):
    def fails(source: Path) -> str:
        assert shard(source, tmp_path / "out") == 1
        return one_error_line(capsys)

    assert f"{tmp_path / 'no.tar'} does not exist" in fails(tmp_path / "no.tar")
    (tmp_path / "text.tar").write_text("no archive")
    assert "is not a tar archive" in fails(tmp_path / "text.tar")
    (tmp_path / "flat.tar").write_bytes(tar_bytes(class_images(WNIDS[0], 2)))
    assert "holds no per-synset tar" in fails(tmp_path / "flat.tar")
    (tmp_path / "set" / "train" / "dog").mkdir(parents=True)
    assert "try --source" in fails(tmp_path / "set")
    assert "named by a WordNet id" in fails(tmp_path / "set" / "train")
    (tmp_path / "hollow" / "n00000001").mkdir(parents=True)
    assert "no images found" in fails(tmp_path / "hollow")
    (tmp_path / "hollow" / "n00000001" / "a.jpg").write_text("x")
    assert "1 unusable files; a.jpg: not an image" in fails(tmp_path / "hollow")
    source = archive(tmp_path / "s.tar")
    (tmp_path / "cut.tar").write_bytes(source.read_bytes()[:-30_000])
    assert "cut.tar" in fails(tmp_path / "cut.tar")
    assert not list((tmp_path / "out").iterdir())


def test_output_inside_the_source_is_refused(tmp_path, capsys):
    (tmp_path / "n00000001").mkdir()
    (tmp_path / "n00000001" / "a.jpg").write_bytes(image_bytes(1))
    assert shard(tmp_path, tmp_path / "out") == 1
    assert "lies inside the source" in one_error_line(capsys)


@pytest.mark.parametrize("where", ["header", "end"])
def test_a_damaged_inner_tar_is_named_and_nothing_is_lost_silently(tmp_path, where):
    inner = bytearray(tar_bytes(class_images("n00000001", 6)))
    if where == "header":
        with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
            at = tar.getmembers()[3].offset
        inner[at : at + 100] = b"\x07" * 100  # tarfile alone takes this for the end of the archive
    else:
        inner = inner[:4000]
    path = tmp_path / "s.tar"
    path.write_bytes(tar_bytes({"n00000001.tar": bytes(inner), "n00000002.tar": tar_bytes(class_images(WNIDS[2], 1))}))
    with pytest.raises(SourceError, match=r"s\.tar: n00000001\.tar is damaged"):
        list(Source(path))


def test_usage_errors_are_exit_code_2_and_debug_shows_the_traceback(tmp_path, capsys):
    for arguments in (["shard"], ["shard", "--quality", "200"], ["nothing"], ["labels", "a"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "200 is not in 1..95" in capsys.readouterr().err
    with pytest.raises(SourceError):
        shard(tmp_path / "no.tar", tmp_path / "out", "--debug")


def test_labels_command(built, capsys):
    assert main(["labels", "hornet-22k", "imagenet-1k"]) == 0
    assert "10459 classes; imagenet-1k: 1000 classes; in both: 1000" in capsys.readouterr().out
    assert main(["labels", str(built), "winter21-p"]) == 0
    assert main(["labels", "imagenet-1k", str(built / "nowhere")]) == 1
    assert "does not exist" in one_error_line(capsys)


def test_killed_at_any_moment_then_the_same_command(tmp_path):
    source = archive(tmp_path / "s.tar", count=150)
    command = [sys.executable, "-m", "data_prep", "shard", "--source", str(source), "--name", "t", "--workers", "2"]
    command += ["--samples-per-shard", "20", "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, cwd=ROOT, capture_output=True)
    whole, out = digests(tmp_path / "whole"), tmp_path / "out"
    interrupted = 0
    for files_there in (1, 8, 30):
        run = subprocess.Popen([*command, str(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and (not out.exists() or len(list(out.iterdir())) < files_there):
            time.sleep(0.002)
        os.kill(run.pid, signal.SIGKILL)
        interrupted += run.wait() == -signal.SIGKILL
        there = digests(out)
        # Whatever has its final name is complete.
        assert all(there[name] == whole[name] for name in there if not name.startswith("."))
    assert interrupted
    subprocess.run([*command, str(out)], check=True, cwd=ROOT, capture_output=True)
    assert digests(out) == whole


WAITS_IN_MID_BUILD = """
import time
from data_prep.images import ImagePolicy, prepare_all
from data_prep.sources import Record

def records():
    for i in range(200):
        yield Record("n00000001", str(i), b"")
        if i > 150:
            print("waiting", flush=True)
            time.sleep(60)

if __name__ == "__main__":
    list(prepare_all(records(), ImagePolicy(), workers=2))
"""


def test_workers_end_with_a_killed_run(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(WAITS_IN_MID_BUILD)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.readline() == b"waiting\n"
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) >= 2
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    left = psutil.wait_procs(workers, timeout=10)[1]
    for process in left:
        process.kill()
    assert not left
