"""`index`: indexes elsewhere than the tars, some of their classes, and what is no sample."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.foreign.index import ensure_indexed
from data_prep.manifest import Manifest
from data_prep.storage import StorageError
from pipeline.config.load import load
from pipeline.data.shards import ShardReader
from tests.data_prep.foreign.test_index import A, B, C, by_key, index, jpeg, numbers, write_tar
from tests.support.object_store import ObjectStore
from tests.support.read_only import run_beside
from tests.support.runs import ROOT, run_module
from tests.support.web import web_server


def samples(path: Path, split: str) -> list[tuple[bytes, str]]:
    """(bytes, WordNet id) of every sample, as a run reads them."""
    config = load(ROOT / "configs" / "demo_pretrain.yaml", [f"data.path={path}", f"data.cache_folder={path}"])
    manifest = Manifest.load(config.data.path)
    reader = ShardReader(config.data, manifest, split)
    found = [(reader.encoded(i), manifest.synsets[reader.label(i)]) for i in range(len(reader))]
    reader.close()
    return found


def test_indexes_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tars, at = tmp_path / "tars", tmp_path / "indexes"
    tars.mkdir()
    for number in range(2):
        by_key(tars / f"train-{number}.tar", (C, A), first=10 * number)
    by_key(tars / "val-0.tar", (B,), first=90)
    assert index(tars, "--index-folder", str(at)) == 0
    assert sorted(p.name for p in tars.iterdir()) == ["train-0.tar", "train-1.tar", "val-0.tar"]
    expected = [(jpeg(0), C), (jpeg(1), A), (jpeg(10), C), (jpeg(11), A)]
    assert samples(at, "train") == samples(at / "dataset.json", "train") == expected
    assert main(["verify", str(at), "--workers", "1"]) == 0
    assert main(["labels", str(at), "imagenet-1k"]) == 0
    capsys.readouterr()
    assert index(tars, "--index-folder", str(at)) == 1
    assert "--force makes another" in capsys.readouterr().err
    elsewhere = Manifest.load(at)
    assert index(tars) == 0
    assert Manifest.load(tars).dataset_id == elsewhere.dataset_id  # runs may go from one to the other
    with open(tars / "train-1.tar", "r+b") as file:
        file.seek(600)
        file.write(bytes(50))
    assert main(["verify", str(at), "--workers", "1"]) == 1
    assert "train-1.tar: differs from its sha256" in capsys.readouterr().out
    (tars / "train-1.tar").unlink()
    assert main(["verify", str(at), "--workers", "1", "--fast"]) == 1


def test_an_index_folder_of_other_tars_is_not_taken_for_these(tmp_path: Path) -> None:
    for name, wnid in (("one", A), ("two", B)):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "train.tar", [(f"{wnid}_1.jpg", jpeg(1))])
    assert index(tmp_path / "two", "--index-folder", str(tmp_path / "at")) == 0
    assert index(tmp_path / "one", "--index-folder", str(tmp_path / "at"), "--force") == 0
    assert samples(tmp_path / "at", "train") == [(jpeg(1), A)]


def test_tars_behind_a_url_with_local_indexes(tmp_path: Path, s3: ObjectStore) -> None:
    s3.put("tars/train-0.tar", by_key(tmp_path / "train-0.tar", (C, A)).read_bytes())
    assert main(["index", "s3://bucket/tars", "--index-folder", str(tmp_path / "at")]) == 0
    names = {entry["Key"] for entry in s3.client.list_objects_v2(Bucket="bucket")["Contents"]}
    assert names == {"tars/train-0.tar"}
    assert samples(tmp_path / "at", "train") == [(jpeg(0), C), (jpeg(1), A)]
    assert main(["verify", str(tmp_path / "at"), "--workers", "1"]) == 0


def test_no_password_is_kept_with_the_indexes(tmp_path: Path) -> None:
    """Nor shown: the address of tars elsewhere stands in dataset.json, for everybody who reads it."""
    by_key(tmp_path / "train-0.tar", (C, A))
    with web_server(tmp_path) as address:
        known = address.replace("//", "//bob:hunter2@")
        refused = run_module("data_prep", "index", known, "--index-folder", str(tmp_path / "at"))
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith(f"error: {address}: with --index-folder its address is kept in dataset.json")
        assert not (tmp_path / "at").exists()
        traced = run_module("data_prep", "index", known, "--index-folder", str(tmp_path / "at"), "--debug")
    assert "Traceback" in traced.stderr
    assert "hunter2" not in refused.stderr + traced.stderr


def test_tars_on_a_read_only_mount(tmp_path: Path) -> None:
    """`index` and a run's preflight say at once what to do, and that works."""
    tars = tmp_path / "tars"
    tars.mkdir()
    by_key(tars / "train-0.tar", (A, B) * 8)
    by_key(tars / "val-0.tar", (A, B), first=90)
    said = f"`python -m data_prep index {tars} --index-folder DIR`, and train with data.path=DIR"
    check = ("pipeline", "pretrain", "configs/demo_pretrain.yaml", f"output_root={tmp_path / 'runs'}", "--check")
    check += ("train.global_batch=8", "train.micro_batch=4")
    for command in (("data_prep", "index", str(tars)), (*check, f"data.path={tars}")):
        done = run_beside(tars, *command)
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
        assert said in line
        assert "Traceback" not in done.stderr
    assert run_beside(tars, "data_prep", "index", str(tars), "--index-folder", str(tmp_path / "at")).returncode == 0
    done = run_beside(tars, *check, f"data.path={tmp_path / 'at'}")
    assert done.returncode == 0, done.stderr


def test_what_ensure_indexed_says_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_key(tmp_path / "train.tar", (A, B))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(StorageError, match=r"Read-only file system\): .* --index-folder DIR`, and train with"):
        ensure_indexed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train.tar"]


def test_some_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    by_key(tars / "train-0.tar", (A, B, C, A))
    by_key(tars / "train-1.tar", (B, B), first=10)  # none of them: no shard of this data set
    by_key(tars / "val-0.tar", (C, B), first=20)
    wanted = tmp_path / "wanted.txt"
    wanted.write_text(f"{C}\n{A}\n")
    assert index(tars, "--classes", str(wanted)) == 1
    assert "--others skip" in capsys.readouterr().err
    assert index(tars, "--others", "skip") == 1
    assert "add --classes" in capsys.readouterr().err
    assert index(tars, "--classes", str(wanted), "--others", "skip") == 0
    assert "3 train in 1 tars, 1 val in 1 tars; 2 classes; 4 samples of other classes skipped" in (
        capsys.readouterr().out
    )
    manifest = Manifest.load(tars)
    assert manifest.synsets == [C, A]
    assert {name: split.class_counts for name, split in manifest.splits.items()} == {"train": [1, 2], "val": [1, 0]}
    assert samples(tars, "train") == [(jpeg(0), A), (jpeg(2), C), (jpeg(3), A)]
    assert main(["verify", str(tars), "--workers", "1"]) == 0
    # Other classes, and all of them, are found again.
    wanted.write_text(f"{B}\n")
    assert index(tars, "--classes", str(wanted), "--others", "skip", "--force") == 0
    assert Manifest.load(tars).split("train").class_counts == [3]
    assert index(tars, "--force") == 0
    assert Manifest.load(tars).split("train").class_counts == [2, 3, 1]
    assert index(tars, "--classes", str(wanted), "--others", "skip", "--force") == 0  # from indexes that have all
    assert samples(tars, "val") == [(jpeg(21), B)]
    assert main(["verify", str(tars), "--workers", "1"]) == 0


def test_numbers_are_not_chosen_among(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers(tmp_path / "train.tar", [0, 1])
    wanted = tmp_path / "wanted.txt"
    wanted.write_text(f"{C}\n")
    assert index(tmp_path, "--classes", str(wanted), "--others", "skip") == 1
    assert "only as a number: --others skip needs WordNet ids" in capsys.readouterr().err


def test_hidden_folders_and_tars_are_left_alone(tmp_path: Path) -> None:
    members = [(f"{A}_1.jpg", jpeg(1)), (f".ipynb_checkpoints/{A}_1-checkpoint.jpg", jpeg(1))]
    members += [(f"{folder}/{B}/{B}_2.jpg", jpeg(2)) for folder in ("__MACOSX", ".Trash-0", "@eaDir")]
    write_tar(tmp_path / "train.tar", members)
    (tmp_path / "._train.tar").write_bytes(b"no tar")
    assert index(tmp_path, "--split", "train=*.tar") == 0
    assert samples(tmp_path, "train") == [(jpeg(1), A)]


@pytest.mark.parametrize("size", [0, 512])
def test_a_tar_of_nothing(tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    by_key(tmp_path / "train-0.tar", (A, B))
    (tmp_path / "train-1.tar").write_bytes(bytes(size))
    assert index(tmp_path) == 1
    assert f"train-1.tar has {size} bytes, not even a tar's end mark" in capsys.readouterr().err


def test_duplicates_of_tars_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through their indexes, here kept elsewhere; an image is called by its key."""
    tars, at = tmp_path / "tars", tmp_path / "at"
    tars.mkdir()
    write_tar(tars / "train-0.tar", [(f"{A}_1.jpg", jpeg(1)), (f"{B}_2.jpg", jpeg(2)), (f"{C}_3.jpg", jpeg(1))])
    by_key(tars / "val-0.tar", (C,), first=2)
    assert index(tars, "--index-folder", str(at)) == 0
    command = ["duplicates", str(at), "--within", "--against", str(at), "--max-distance", "0", "--workers", "1"]
    assert main(command) == 0
    listed = (at / "duplicates" / "exclude.txt").read_text().splitlines()
    assert [line for line in listed if not line.startswith("#")] == [f"{B}\t{B}_2", f"{C}\t{C}_3"]
    assert "WordNet id and key" in listed[0]
    assert "data:image/jpeg" in (at / "duplicates" / "duplicates.html").read_text()
    capsys.readouterr()


def test_a_run_on_indexes_elsewhere(tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    by_key(tars / "train-0.tar", (A, B) * 8)
    by_key(tars / "val-0.tar", (A, B), first=90)
    assert index(tars, "--index-folder", str(tmp_path / "at")) == 0
    before = {path.name: path.stat().st_mtime_ns for path in tars.iterdir()}
    done = run_module(
        *("pipeline", "pretrain", "configs/demo_pretrain.yaml", f"data.path={tmp_path / 'at' / 'dataset.json'}"),
        *(f"output_root={tmp_path / 'runs'}", "data.resolution=32", "data.workers_per_rank=0", "train.global_batch=8"),
        *("train.micro_batch=4", "name=elsewhere", "train.epochs=1", "optimizer.warmup_epochs=0.5"),
        *("evaluate.every_epochs=1", "evaluate.micro_batch=8"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name: path.stat().st_mtime_ns for path in tars.iterdir()} == before
    shutil.rmtree(tmp_path / "runs")
    assert np.array_equal(Manifest.load(tmp_path / "at").split("train").class_counts, [8, 8])


def test_what_is_said_of_tars_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(name: str, *options: str) -> str:
        assert index(tmp_path / name, *options) == 1
        return capsys.readouterr().err

    for split in ("train", "val"):
        (tmp_path / "inside" / split).mkdir(parents=True)
        by_key(tmp_path / "inside" / split / "0.tar", (A,))
    assert "they lie in train/, val/: " in refused("inside")
    for name in ("dots", "text", "one-based"):
        (tmp_path / name).mkdir()
    write_tar(tmp_path / "dots" / "train.tar", [("v1.2.000.jpg", jpeg(1)), ("v1.2.000.cls", b"0")])
    told = refused("dots")
    assert "'v1' (no image) holds 2.000.cls, 2.000.jpg: a key ends at its first dot" in told
    assert "--skip-unlabelled" not in told
    write_tar(tmp_path / "text" / "train.tar", [("0.jpg", jpeg(1)), ("0.cls", b"tench")])
    assert "'0' (no class) holds cls, jpg: an image is .jpg" in refused("text")
    numbers(tmp_path / "one-based" / "train.tar", [1, 2])
    classes = tmp_path / "classes.txt"
    classes.write_text(f"{A}\n{B}\n")
    told = refused("one-based", "--classes", str(classes))
    assert "have the numbers 0 to 1; here are 1 to 2: do they begin with 1?" in told
    assert "--others" not in told
    classes.write_text(f"n00000000\n{A}\n{B}\n")
    assert index(tmp_path / "one-based", "--classes", str(classes)) == 0
