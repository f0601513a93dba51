"""Tars that somebody else wrote: their indexes and manifest, and training on them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep.__main__ import main
from data_prep.foreign.index import ensure_indexed
from data_prep.foreign.scan import ForeignError
from data_prep.foreign.tar import scan_tar
from data_prep.manifest import Manifest, ShardIndex, file_sha256
from data_prep.storage import Folder
from tests.support.datasets import SYNSETS_22K, drawing
from tests.support.object_store import ObjectStore
from tests.support.runs import run_module

A, B, C = "n01440764", "n02084071", "n07739125"


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, **pax: str) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), pax
            tar.addfile(info, io.BytesIO(data))
    return path


def jpeg(seed: int) -> bytes:
    return drawing(A, seed)


def by_key(path: Path, wnids: tuple[str, ...], first: int = 0) -> Path:
    members = [(f"{wnid}_{first + i}.jpg", jpeg(first + i)) for i, wnid in enumerate(wnids)]
    return write_tar(path, members)


def index(path: Path, *options: str) -> int:
    return main(["index", str(path), *options])


def images(folder: Path, split: str) -> dict[str, tuple[bytes, str]]:
    """(bytes, WordNet id) of each image by key, through the index."""
    manifest, found = Manifest.load(folder), {}
    for entry in manifest.split(split).shards:
        data = (folder / entry.file).read_bytes()
        assert (len(data), file_sha256(folder / entry.file)) == (entry.bytes, entry.sha256)
        rows = manifest.load_index(folder, entry)
        for key, offset, size, label in zip(rows.keys, rows.offsets, rows.sizes, rows.labels, strict=True):
            found[str(key)] = (data[offset : offset + size], manifest.synsets[label])
    return found


def test_what_webdataset_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same samples that the webdataset package finds in tars that it wrote itself."""
    folder = tmp_path / "set"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"train-{shard}.tar")) as writer:
            for i in range(7):
                wnid = (A, B, C)[int(rng.integers(3))]
                name = f"dir.with.dots/{shard}{i:03d}"
                described = {"filename": f"{wnid}/{wnid}_{i}.JPEG", "label": 3}
                writer.write({"__key__": name, "jpg": jpeg(i + 10 * shard), "json": described})
    by_key(folder / "val-0.tar", (A, C))
    (folder / "notes.txt").write_text("not a tar")
    assert index(folder) == 0
    assert "21 train in 3 tars, 2 val in 1 tars; 3 classes" in capsys.readouterr().out
    urls = str(folder / "train-{0..2}.tar")
    wanted = {
        sample["__key__"]: (sample["jpg"], json.loads(sample["json"])["filename"][:9])
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    }
    assert images(folder, "train") == wanted
    assert len(wanted) == 21
    assert list(images(folder, "val")) == [f"{A}_0", f"{C}_1"]
    assert Manifest.load(folder).synsets == [A, B, C]
    assert main(["verify", str(folder), "--fast", "--workers", "1"]) == 0


def test_every_form_of_tar(tmp_path: Path) -> None:
    long = "a-folder-of-a-long-name/" * 6 + f"{B}_x"
    members = [("n01440764_1.JPG", jpeg(1)), (f"{long}.jpeg", jpeg(2)), (f"{C}/1.WebP", b"webp"), (f"{C}/2.png", b"")]
    read = []
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        extra = {"comment": "x" * 3000} if form == tarfile.PAX_FORMAT else {}
        folder = tmp_path / str(number)
        folder.mkdir()
        write_tar(folder / "train.tar", members, form, **extra)
        assert index(folder) == 0
        read.append(images(folder, "train"))
    assert read[0] == read[1]
    assert list(read[0]) == ["n01440764_1", long, f"{C}/1", f"{C}/2"]
    assert [data for data, _ in read[0].values()] == [data for _, data in members]
    assert [wnid for _, wnid in read[0].values()] == [A, B, C, C]


def test_what_is_no_sample_and_two_images(tmp_path: Path) -> None:
    members = [("__meta__.jpg", b"x"), (".hidden.jpg", b"x"), ("README", b"x"), (f"{A}_1.png", b"png")]
    members += [(f"{A}_1.seg.png", b"mask"), (f"{A}_1.jpg", b"jpg"), (f"{A}_1.txt", b"fish")]
    write_tar(tmp_path / "train.tar", members)
    assert index(tmp_path) == 0
    assert images(tmp_path, "train") == {f"{A}_1": (b"jpg", A)}


def numbers(path: Path, labels: list[Any], extension: str = "cls") -> Path:
    members = []
    for i, label in enumerate(labels):
        said = str(label) if extension == "cls" else json.dumps({"label": label})
        members += [(f"{i:04d}.jpg", jpeg(i)), (f"{i:04d}.{extension}", said.encode())]
    return write_tar(path, members)


@pytest.mark.parametrize("extension", ["cls", "json"])
def test_numbers_need_classes(tmp_path: Path, extension: str, capsys: pytest.CaptureFixture[str]) -> None:
    numbers(tmp_path / "train-1.tar", [2, 0, 2], extension)
    assert index(tmp_path) == 1
    assert "'0000' (class number 2) gives its class only as a number" in (told := capsys.readouterr().err)
    assert "--classes" in told
    classes = tmp_path / "classes.txt"
    classes.write_text(f"{C}\n{A}\n")
    assert index(tmp_path, "--classes", str(classes)) == 1
    assert "is not in --classes, whose 2 have the numbers 0 to 1" in capsys.readouterr().err
    assert not (tmp_path / "dataset.json").exists()
    classes.write_text(f"{C}\n{A}\n{B}\n")
    assert index(tmp_path, "--classes", str(classes)) == 0
    manifest = Manifest.load(tmp_path)
    assert manifest.synsets == [C, A, B]
    assert manifest.split("train").class_counts == [1, 0, 2]
    assert index(tmp_path) == 1
    assert "--force makes another" in capsys.readouterr().err
    assert index(tmp_path, "--force", "--classes", "imagenet-1k") == 0
    assert Manifest.load(tmp_path).synsets[:1] == [A]
    assert Manifest.load(tmp_path).dataset_id != manifest.dataset_id


def test_wordnet_ids_against_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_key(tmp_path / "train.tar", (A, C, A))
    classes = tmp_path / "classes.txt"
    classes.write_text(f"{C}\n{B}\n")
    assert index(tmp_path, "--classes", str(classes)) == 1
    assert f"({A}) has a class that is none" in capsys.readouterr().err
    classes.write_text(f"{C}\n{B}\n{A}\n{A}\n")
    assert index(tmp_path, "--classes", str(classes)) == 1
    classes.write_text(f"{C}\n{B}\n{A}\n")
    assert index(tmp_path, "--classes", str(classes)) == 0
    assert Manifest.load(tmp_path).split("train").class_counts == [1, 0, 2]


def test_samples_without_image_or_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [(f"{i}.jpg", jpeg(i)) for i in range(7)] + [(f"{A}_1.json", b"{}"), (f"{A}_2.jpg", jpeg(9))]
    members += [("x.jpg", b""), ("x.json", b"no json"), ("y.jpg", b""), ("y.cls", b"fish")]
    write_tar(tmp_path / "train.tar", members)
    assert index(tmp_path) == 1
    told = capsys.readouterr().err
    assert "10 of 11 samples have no image or no class: '0' (no class), '1' (no class)" in told
    assert "'5'" not in told
    assert index(tmp_path, "--skip-unlabelled") == 0
    assert "1 train in 1 tars; 1 classes; 10 samples left out" in capsys.readouterr().out
    assert images(tmp_path, "train") == {f"{A}_2": (jpeg(9), A)}
    assert index(tmp_path, "--force") == 1


@pytest.mark.parametrize(
    "names", [("a.jpg", "b.jpg", "a.json"), ("a.jpg", "a.jpg"), ("a.jpg", "a.cls", "b.jpg", "a.jpg")]
)
def test_a_key_twice(tmp_path: Path, names: tuple[str, ...]) -> None:
    write_tar(tmp_path / "train.tar", [(f"{A}_{name}", b"0") for name in names])
    with pytest.raises(ForeignError, match=rf"train.tar: '{A}_a.*' at byte \d+ is of the key '{A}_a'.* with .*jpg"):
        scan_tar(Folder(tmp_path), "train.tar")


def test_damaged_tars(tmp_path: Path) -> None:
    path = by_key(tmp_path / "train.tar", (A, B, C))
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    with pytest.raises(ForeignError, match=r"train.tar: bytes \d+ to 3000 cannot be read"):
        scan_tar(Folder(tmp_path), "train.tar")
    path.write_bytes(whole[:512] + whole[600:])
    with pytest.raises(ForeignError, match="cannot be read"):
        scan_tar(Folder(tmp_path), "train.tar")
    path.write_bytes(b"this is no tar at all" * 1000)
    with pytest.raises(ForeignError, match="cannot be read"):
        scan_tar(Folder(tmp_path), "train.tar")


def test_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        by_key(tmp_path / f"part-{number:02d}.tar", (A, B), first=10 * number)
    assert index(tmp_path) == 1
    assert "part-00.tar, ...: say which are which with --split" in capsys.readouterr().err
    assert index(tmp_path, "--split", "train=part-{00..02}.tar", "--split", "val=part-0[23].tar") == 1
    assert "part-02.tar belongs to two splits" in capsys.readouterr().err
    assert index(tmp_path, "--split", "train") == 1
    assert index(tmp_path, "--split", "train=part-{00..02}.tar", "--split", "val=part-03.tar") == 0
    manifest = Manifest.load(tmp_path)
    assert [len(manifest.split(name).shards) for name in ("train", "val")] == [3, 1]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert index(empty) == 1
    assert "holds no .tar" in capsys.readouterr().err


def test_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        by_key(tmp_path / f"train-{number}.tar", ((C, B, A)[number], A), first=10 * number)
    good = (tmp_path / "train-2.tar").read_bytes()
    (tmp_path / "train-2.tar").write_bytes(good[:2000])
    assert index(tmp_path) == 1
    (tmp_path / "train-2.tar").write_bytes(good)
    done = {path.name for path in tmp_path.glob("*.index.npz")}
    assert not (tmp_path / "dataset.json").exists()
    read: list[str] = []

    def watched(folder: Folder, name: str, *rest: Any) -> Any:
        read.append(name)
        return scan_tar(folder, name, *rest)

    monkeypatch.setattr("data_prep.foreign.index.scan_tar", watched)
    assert index(tmp_path) == 0
    assert sorted(read) == [f"train-{i}.tar" for i in range(3) if f"train-{i}.index.npz" not in done]
    first = (tmp_path / "dataset.json").read_bytes()
    rows = {path.name: path.read_bytes() for path in tmp_path.glob("*.index.npz")}
    assert Manifest.load(tmp_path).split("train").class_counts == [4, 1, 1]
    # A tar that changed is read anew, the others are not; a damaged index likewise.
    read.clear()
    future = (tmp_path / "train-1.index.npz").stat().st_mtime + 10
    os.utime(tmp_path / "train-1.tar", (future, future))
    (tmp_path / "train-0.index.npz").write_bytes(b"PK damaged")
    assert index(tmp_path, "--force") == 0
    assert sorted(read) == ["train-0.tar", "train-1.tar"]
    assert (tmp_path / "dataset.json").read_bytes() == first
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.index.npz")} == rows


def test_builds_of_ours_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_key(tmp_path / "train-000000.tar", (A, B))
    ShardIndex(["x"], [0], [1], [0]).save(tmp_path / "train-000000.index.npz")  # type: ignore[arg-type]
    assert index(tmp_path) == 1
    assert "not by this command" in capsys.readouterr().err
    (tmp_path / ".data_prep").mkdir()
    (tmp_path / ".data_prep" / "build.json").write_text("{}")
    ensure_indexed(tmp_path)
    assert index(tmp_path) == 1
    assert "unfinished build" in capsys.readouterr().err
    assert not (tmp_path / "dataset.json").exists()


def picture(form: str, seed: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg(seed))).save(file, form)
    return file.getvalue()


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images of all formats are decoded; keys are unique in a tar; what else lies there does not matter."""
    forms = ("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")
    for shard in range(2):
        members = [(f"{A}_{i}.{name}", picture(form, 3 * shard + i)) for i, (name, form) in enumerate(forms)]
        write_tar(tmp_path / f"train-{shard}.tar", [*members, (f"{A}_2.txt", b"fish"), ("README", b"x")])
    by_key(tmp_path / "test-0.tar", (B,))
    assert index(tmp_path) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path} is whole: 1 splits, 2 shards, 6 samples (decoded)")
    (tmp_path / "train-1.tar").unlink()
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 1
    assert "train-1.tar: is missing" in capsys.readouterr().out


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(_: bytes) -> bytes:
    return b""


def hole(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(200) + data[len(data) // 2 + 200 :]


# A WebP holds no marks or checksums: a hole in one is other pixels.
@pytest.mark.parametrize(
    ("form", "damage"),
    [("JPEG", cut), ("PNG", cut), ("WEBP", cut), ("JPEG", hole), ("PNG", hole), ("PNG", bytes.lower), ("JPEG", empty)],
)
def test_verify_finds_damaged_images(
    tmp_path: Path, form: str, damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that were damaged before the tar was indexed: the checksum is right."""
    name = "jpg" if form == "JPEG" else form.lower()
    whole = [picture(form, seed) for seed in range(4)]
    by_key(tmp_path / "train-0.tar", (A, B))
    write_tar(
        tmp_path / "train-1.tar",
        [(f"{B}_{i}.{name}", damage(data) if i in (0, 2) else data) for i, data in enumerate(whole)],
    )
    assert index(tmp_path) == 0
    assert main(["verify", str(tmp_path), "--workers", "1", "--fast"]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 1
    *problems, summary = capsys.readouterr().out.splitlines()
    assert [line.split(" cannot be decoded: ")[0] for line in problems] == [
        f"train-1.tar: {B}_0",
        f"train-1.tar: {B}_2",
    ]
    assert f"{tmp_path} is NOT whole: 2 problem(s) in 1 file(s)" in summary


def test_verify_finds_changed_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = by_key(tmp_path / "train-0.tar", (A, B, C))
    assert index(tmp_path) == 0
    rows = ShardIndex.load(tmp_path / "train-0.index.npz")
    with open(path, "r+b") as file:
        file.seek(int(rows.offsets[1]))
        file.write(bytes(100))
    capsys.readouterr()
    assert main(["verify", str(tmp_path), "--workers", "2"]) == 1
    told = capsys.readouterr().out
    assert "train-0.tar: differs from its sha256" in told
    assert f"train-0.tar: {B}_1 cannot be decoded" in told


def test_ensure_indexed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensure_indexed(tmp_path)
    ensure_indexed(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""
    by_key(tmp_path / "train.tar", (A, B))
    ensure_indexed(tmp_path)
    assert capsys.readouterr().out.count("\n") == 1
    assert Manifest.load(tmp_path).split("train").samples == 2
    ensure_indexed(tmp_path)
    assert capsys.readouterr().out == ""


def test_on_an_object_store(tmp_path: Path, s3: ObjectStore) -> None:
    for number in range(2):
        s3.put(
            f"tars/train-{number}.tar", by_key(tmp_path / f"train-{number}.tar", (C, A, B), number * 10).read_bytes()
        )
    s3.put("tars/validation-0.tar", by_key(tmp_path / "validation-0.tar", (B,), 100).read_bytes())
    with pytest.raises(
        ForeignError, match=r"has to be indexed first, once: `python -m data_prep index s3://bucket/tars`"
    ):
        ensure_indexed("s3://bucket/tars")
    assert main(["index", "s3://bucket/tars"]) == 0
    assert index(tmp_path) == 0
    here, there = Manifest.load(tmp_path), Manifest.load("s3://bucket/tars")
    assert there.splits == here.splits
    assert there.dataset_id == here.dataset_id
    entry = here.split("train").shards[1]
    one, two = here.load_index(tmp_path, entry), there.load_index("s3://bucket/tars", entry)
    assert all(
        np.array_equal(getattr(one, name), getattr(two, name)) for name in ("keys", "offsets", "sizes", "labels")
    )


def test_a_run_on_them(tmp_path: Path) -> None:
    """Training needs nothing but the tars and one command."""
    tars = tmp_path / "tars"
    tars.mkdir()
    for split, shards, first in (("train", 2, 0), ("val", 1, 900)):
        for shard in range(shards):
            members = []
            for i in range(24):
                wnid = SYNSETS_22K[i % 4]
                image = Image.open(io.BytesIO(drawing(wnid, first + 100 * shard + i)))
                file = io.BytesIO()
                image.save(file, ("JPEG", "PNG", "WEBP")[i % 3])
                members.append((f"{wnid}_{shard}_{i}.{('jpg', 'png', 'webp')[i % 3]}", file.getvalue()))
            write_tar(tars / f"{split}-{shard}.tar", members)
    assert run_module("data_prep", "index", str(tars)).returncode == 0
    done = run_module(
        *(
            "pipeline",
            "pretrain",
            "configs/demo_pretrain.yaml",
            f"data.path={tars}",
            f"output_root={tmp_path / 'runs'}",
        ),
        *(
            "data.resolution=32",
            "data.workers_per_rank=0",
            "train.global_batch=8",
            "train.micro_batch=4",
            "name=foreign",
        ),
        *("train.epochs=1", "optimizer.warmup_epochs=0.5", "evaluate.every_epochs=1", "evaluate.micro_batch=8"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
