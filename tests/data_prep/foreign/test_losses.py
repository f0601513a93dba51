"""Fewer samples than the tars of others promise are never taken without a word; and all that names a class counts."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.foreign.index import ensure_indexed
from data_prep.foreign.scan import ForeignError
from data_prep.foreign.tar import IMAGES
from data_prep.images.pil import FORMATS
from data_prep.manifest import Manifest
from tests.data_prep.foreign.test_index import A, B, C, by_key, images, index, jpeg, write_tar

Said = pytest.CaptureFixture[str]


def linked_tar(folder: Path, *, target: str) -> Path:
    """By GNU tar, which writes the second of two names of one file as a hard link, and symbolic links as such."""
    files = folder / "files"
    (files / A).mkdir(parents=True)
    (files / B).mkdir()
    (files / A / "1.jpg").write_bytes(jpeg(1))
    (files / A / "1.cls").write_text(C)
    (files / B / "2.jpg").hardlink_to(files / A / "1.jpg")
    (files / B / ("3" * 120 + ".jpg")).hardlink_to(files / A / "1.jpg")
    (files / B / "4.jpg").symlink_to(target)
    (files / B / "5.jpg").symlink_to("4.jpg")
    (files / "6.cls").hardlink_to(files / A / "1.cls")
    (files / "6.jpg").write_bytes(jpeg(6))
    path = folder / "train.tar"
    subprocess.run(["tar", "-cf", path, "--sort=name", "-C", files, "."], check=True)
    return path


def test_links_are_the_files_they_name(tmp_path: Path, capsys: Said) -> None:
    linked_tar(tmp_path, target=f"../{A}/1.jpg")
    assert index(tmp_path) == 0
    of_b = {f"./{B}/{name}": (jpeg(1), B) for name in ("2", "3" * 120, "4", "5")}
    assert images(tmp_path, "train") == {"./6": (jpeg(6), C), f"./{A}/1": (jpeg(1), C), **of_b}
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 0
    capsys.readouterr()


def test_links_that_lead_nowhere_are_told(tmp_path: Path, capsys: Said) -> None:
    linked_tar(tmp_path, target="/elsewhere/1.jpg")
    assert index(tmp_path) == 1
    told = capsys.readouterr().err
    assert "2 of 6 samples have no image or no class" in told
    assert f"'./{B}/4' (its jpg is a link to '/elsewhere/1.jpg', which is not in the tar)" in told
    assert index(tmp_path, "--skip-unlabelled") == 0
    assert "2 samples left out" in capsys.readouterr().out


def test_every_tar_that_braces_name_must_be_there(tmp_path: Path, capsys: Said) -> None:
    for number in (0, 1, 3, 7):
        by_key(tmp_path / f"part-{number:06d}.tar", (A, B), first=10 * number)
    assert index(tmp_path, "--split", "train=part-{000000..000003}.tar") == 1
    assert f"{tmp_path} has no part-000002.tar (1 of those that --split names)" in capsys.readouterr().err
    assert index(tmp_path, "--split", "train=part-{000000..000001}.tar", "--split", "val=val*.tar") == 1
    assert "has no val*.tar" in capsys.readouterr().err
    assert not (tmp_path / "dataset.json").exists()
    # As webdataset takes it: lists joined by ::, braces in each.
    assert index(tmp_path, "--split", "train=part-{000000..000001}.tar::part-00000{3,7}.tar") == 0
    assert [entry.file[-5] for entry in Manifest.load(tmp_path).split("train").shards] == list("0137")


def test_a_tar_without_its_end(tmp_path: Path, capsys: Said) -> None:
    """Cut between two members it looks whole but for the zeros that end a tar."""
    whole = by_key(tmp_path / "train-0.tar", (A, B, C)).read_bytes()
    size = len(whole.rstrip(b"\0"))
    (tmp_path / "train-0.tar").write_bytes(whole[: -(-size // 512) * 512])
    for _ in range(2):
        assert index(tmp_path, "--force") == 1
        assert "without a tar's end mark, as one that was cut short does: copy it again" in capsys.readouterr().err
        assert index(tmp_path, "--unmarked", "--force") == 0  # and again: what was accepted once is not for ever
    assert len(images(tmp_path, "train")) == 3


def test_compressed_tars_are_told_from_damaged_ones(tmp_path: Path, capsys: Said) -> None:
    whole = by_key(tmp_path / "train-0.tar", (A, B)).read_bytes()
    (tmp_path / "train-0.tar").write_bytes(gzip.compress(whole))
    assert index(tmp_path) == 1
    assert "train-0.tar is a gzip file, in which no sample can be found: unpack it" in capsys.readouterr().err
    (tmp_path / "train-0.tar").rename(tmp_path / "train-0.tar.gz")
    assert index(tmp_path) == 1
    assert "holds compressed tars (train-0.tar.gz, ...)" in capsys.readouterr().err
    with pytest.raises(ForeignError, match="holds compressed tars"):
        ensure_indexed(tmp_path)  # what a run begins with
    (tmp_path / "train").mkdir()
    (tmp_path / "train-0.tar.gz").rename(tmp_path / "train" / "0.tar")
    with pytest.raises(ForeignError, match=r"has no tar, they lie in train/: .* give one of these"):
        ensure_indexed(tmp_path)


def test_what_info_json_promises(tmp_path: Path, capsys: Said) -> None:
    for number in range(2):
        by_key(tmp_path / f"train-{number}.tar", (A, B), first=10 * number)

    def promise(*lengths: int) -> None:
        split = {"filenames": [f"train-{i}.tar" for i in range(len(lengths))], "shard_lengths": lengths}
        (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))

    promise(2, 2, 2)
    assert index(tmp_path) == 1
    assert "train-2.tar is listed in _info.json and missing (1 of 3 are)" in capsys.readouterr().err
    promise(2, 3)
    assert index(tmp_path, "--split", "train=train-{0..1}.tar") == 1
    assert "train-1.tar holds 2 samples, _info.json says 3" in capsys.readouterr().err
    promise(2, 2)
    assert index(tmp_path) == 0


def test_images_of_any_name(tmp_path: Path, capsys: Said) -> None:
    """None is "no image": they are decoded, or `verify` names them."""
    forms = {"jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "tif": "TIFF"}
    members = []
    for number, extension in enumerate(IMAGES):
        file = io.BytesIO()
        Image.open(io.BytesIO(jpeg(number))).save(file, forms.get(extension, extension.upper()))
        members.append((f"{A}_{number}.{extension}", file.getvalue()))
    assert {"avif", "bmp", "gif", "tif", "tiff", "ppm", "jpe", "jfif", "webp", "png"} <= set(IMAGES)
    write_tar(tmp_path / "train.tar", members)
    assert index(tmp_path) == 0
    assert [data for data, _ in images(tmp_path, "train").values()] == [data for _, data in members]
    capsys.readouterr()
    named = [] if "AVIF" in FORMATS else [f"train.tar: {A}_{IMAGES.index('avif')} cannot be decoded"]
    assert main(["verify", str(tmp_path), "--workers", "1"]) == len(named)
    *problems, _ = capsys.readouterr().out.splitlines()
    assert [problem.partition(":")[0] + ":" + problem.split(":")[1] for problem in problems] == named


def test_wordnet_ids_and_numbers_as_text(tmp_path: Path) -> None:
    """In `.cls`, which goes before a name, and as "label" of a JSON."""
    members = [("0.jpg", jpeg(0)), ("0.cls", f"{B}\n".encode()), (f"{C}_1.jpg", jpeg(1)), (f"{C}_1.cls", A.encode())]
    members += [("2.jpg", jpeg(2)), ("2.json", json.dumps({"label": C}).encode())]
    members += [("3.jpg", jpeg(3)), ("3.json", b'{"label": "1"}')]
    write_tar(tmp_path / "train.tar", members)
    (tmp_path / "classes.txt").write_text(f"{A}\n{B}\n{C}\n")
    assert index(tmp_path, "--classes", str(tmp_path / "classes.txt")) == 0
    assert [wnid for _, wnid in images(tmp_path, "train").values()] == [B, A, C, B]
