"""Archive -> shards: contents, determinism, splits, duplicates, messages."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.manifest import Manifest, ManifestError
from data_prep.sources.streams import SourceError
from tests.support.archives import WNIDS, archive, class_images, digests, image_bytes, shard, tar_bytes


def ledger(folder: Path) -> list[dict]:
    return pq.read_table(folder / "ledger.parquet").to_pylist()


def one_error_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


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
    files = digests(built)
    for split in manifest.splits.values():
        for entry in split.shards:
            assert (files[entry.file], (built / entry.file).stat().st_size) == (entry.sha256, entry.bytes)
    assert not (built / ".data_prep").exists()
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
    import gzip

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
    (tmp_path / "source.tar.gz").write_bytes(gzip.compress(source.read_bytes()))
    for kind in ("classes", "tars", "source.tar.gz"):
        assert shard(tmp_path / kind, tmp_path / f"from-{kind}", "--val-per-class", "2") == 0
        ours, theirs = digests(tmp_path / f"from-{kind}"), digests(built)
        for name in ("dataset.json", "ledger.parquet"):  # they name the source, and list images in its order
            del ours[name], theirs[name]
        assert ours == theirs
        assert Manifest.load(tmp_path / f"from-{kind}").dataset_id == Manifest.load(built).dataset_id


def test_limit_per_class_and_its_ledger(tmp_path):
    assert shard(archive(tmp_path / "s.tar"), tmp_path / "out", "--max-images-per-class", "4") == 0
    assert Manifest.load(tmp_path / "out").split("train").class_counts == [4, 4, 4]
    rows = ledger(tmp_path / "out")
    assert len(rows) == 36
    assert sum((r["action"], r["reason"]) == ("skipped", "over_class_limit") for r in rows) == 24
    # Chunks of another size, and so classes cut in other places, make the same choice.
    (tmp_path / "s.tar").write_bytes((tmp_path / "s.tar").read_bytes() + bytes(3 << 20))
    assert shard(tmp_path / "s.tar", tmp_path / "again", "--max-images-per-class", "4") == 0
    assert [e.sha256 for e in Manifest.load(tmp_path / "again").split("train").shards] == [
        e.sha256 for e in Manifest.load(tmp_path / "out").split("train").shards
    ]


def test_separate_validation_source(tmp_path, capsys):
    train = archive(tmp_path / "train.tar")
    val = tmp_path / "val.tar"
    members = {
        f"{wnid}.tar": tar_bytes({f"{wnid}_{i}.JPEG": image_bytes(int(wnid[1:]) + 70 * i) for i in range(100, 103)})
        for wnid in ("n00000001", "n00000009")
    }
    val.write_bytes(tar_bytes(members))
    assert shard(train, tmp_path / "out", "--val-source", str(val)) == 0
    assert Manifest.load(tmp_path / "out").split("val").class_counts == [3, 0, 0]
    left = [r for r in ledger(tmp_path / "out") if r["wnid"] == "n00000009"]
    assert {(r["action"], r["reason"], r["split"], r["shard"]) for r in left} == {
        ("skipped", "class_not_in_train", "", "")
    }
    assert len(left) == 3
    assert "class_not_in_train" in capsys.readouterr().out


def test_val_per_class_leaves_half_of_a_class(tmp_path, capsys):
    assert shard(archive(tmp_path / "s.tar", count=5), tmp_path / "out", "--val-per-class", "4") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.split("train").class_counts == [3, 3, 3]
    assert manifest.split("val").class_counts == [2, 2, 2]
    assert "3 classes gave less than 4 validation images" in capsys.readouterr().out


def test_same_bytes_leak_drop_keep_and_exclude(tmp_path):
    twins = {f"{WNIDS[0]}_twin{i}.JPEG": class_images(WNIDS[1], 12)[f"{WNIDS[1]}_{i}.JPEG"] for i in range(12)}
    source = archive(tmp_path / "s.tar", extra=twins)

    def actions(output: str, *options: str) -> dict[str, set[str]]:
        assert shard(source, tmp_path / output, "--val-per-class", "4", *options) == 0
        found: dict[str, set[str]] = {}
        for row in ledger(tmp_path / output):
            found.setdefault(f"{row['action']} {row['reason']}".strip(), set()).add(row["sha256"])
        return found

    kept = actions("keep", "--duplicates", "keep")
    assert "duplicate same_bytes_in_val" not in kept
    leaked = kept["held_out"] & kept["kept"]
    assert leaked  # chosen by hash of the name, some twins lie on both sides
    leaks = actions("leaks")
    assert leaks["duplicate same_bytes_in_val"] == leaked
    assert not leaks["held_out"] & leaks["kept"]
    assert leaks["held_out"] == kept["held_out"]  # what is held out does not depend on it
    dropped = [
        r["sha256"]
        for r in (actions("drop", "--duplicates", "drop"), ledger(tmp_path / "drop"))[1]
        if r["split"] == "train"
    ]
    assert len(dropped) == len(set(dropped))

    listed = [r for r in ledger(tmp_path / "leaks") if r["action"] == "kept"][:3]
    (tmp_path / "exclude.txt").write_text("# a comment\n" + "".join(f"{r['wnid']}\t{r['name']}\n" for r in listed))
    actions("excluded", "--exclude", str(tmp_path / "exclude.txt"))
    rows = [r for r in ledger(tmp_path / "excluded") if r["reason"] == "listed_in_exclude"]
    assert {(r["wnid"], r["name"], r["action"]) for r in rows} == {(r["wnid"], r["name"], "duplicate") for r in listed}


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


def test_errors_are_one_line_and_exit_code_1(tmp_path, capsys):
    def fails(source: Path, *options: str) -> str:
        assert shard(source, tmp_path / "out", *options) == 1
        return one_error_line(capsys)

    assert f"{tmp_path / 'no.tar'} does not exist" in fails(tmp_path / "no.tar")
    (tmp_path / "hollow" / "n00000001").mkdir(parents=True)
    assert "no usable training images" in fails(tmp_path / "hollow")
    source = archive(tmp_path / "s.tar")
    assert "exclude each other" in fails(source, "--val-source", str(source), "--val-per-class", "2")
    assert "belongs to a --val-source" in fails(source, "--val-labels", str(source))
    assert not (tmp_path / "out" / "dataset.json").exists()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "train-000000.tar").write_bytes(b"precious")
    assert shard(source, tmp_path / "theirs") == 1
    assert "neither dataset.json nor an unfinished build" in one_error_line(capsys)
    assert (tmp_path / "theirs" / "train-000000.tar").read_bytes() == b"precious"


def test_output_inside_the_source_is_refused(tmp_path, capsys):
    (tmp_path / "n00000001").mkdir()
    (tmp_path / "n00000001" / "a.jpg").write_bytes(image_bytes(1))
    assert shard(tmp_path, tmp_path / "out") == 1
    assert "lies inside the source" in one_error_line(capsys)


def test_too_many_rejects_and_damage_are_exit_code_3_and_keep_the_work(tmp_path, capsys):
    extra = {f"bad{i}.JPEG": b"<html>" for i in range(12)}
    source, out = archive(tmp_path / "s.tar", extra=extra), tmp_path / "out"
    assert shard(source, out) == 3
    assert "12 of 48 images are rejected (25.0%: 12 html), more than --max-reject 5.0% allows" in one_error_line(capsys)
    assert not (out / "dataset.json").exists()
    data_files = {p: p.stat().st_mtime_ns for p in (out / ".data_prep" / "chunks").iterdir()}
    assert data_files
    assert shard(source, out, "--max-reject", "30%", "--debug") == 0
    assert Manifest.load(out).split("train").samples == 36

    inner = bytearray(tar_bytes(class_images("n00000001", 6)))
    inner[2000:2100] = b"\x07" * 100
    at = inner.find(b"n00000001_3.JPEG")
    inner[at : at + 100] = b"\x07" * 100
    damaged = tmp_path / "damaged.tar"
    others = {f"{w}.tar": tar_bytes(class_images(w, 6)) for w in WNIDS if w != "n00000001"}
    damaged.write_bytes(tar_bytes({"n00000001.tar": bytes(inner), **others}))
    assert shard(damaged, tmp_path / "d") == 3
    assert "the source is damaged in 1 place(s), first" in one_error_line(capsys)
    assert shard(damaged, tmp_path / "d", "--salvage", "--max-reject", "0.5") == 0
    rows = ledger(tmp_path / "d")
    assert sum(r["reason"] == "damaged_archive" for r in rows) == 1
    assert len(rows) == 18


def test_usage_errors_are_exit_code_2_and_debug_shows_the_traceback(tmp_path, capsys):
    for arguments in (["shard"], ["shard", "--quality", "200"], ["nothing"], ["labels", "a", "b", "c"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "200 is not in 1..95" in capsys.readouterr().err
    with pytest.raises(SourceError):
        shard(tmp_path / "no.tar", tmp_path / "out", "--debug")


@pytest.mark.parametrize("command", ["demo", "plan", "shard", "labels", "duplicates", "verify"])
def test_every_command_teaches_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_leaving_images_out_does_not_move_what_is_held_out(tmp_path):
    source = archive(tmp_path / "s.tar")
    assert shard(source, tmp_path / "a", "--val-per-class", "6") == 0
    held_out = {r["key"] for r in ledger(tmp_path / "a") if r["action"] == "held_out"}
    listed = [r for r in ledger(tmp_path / "a") if r["action"] == "kept" and r["wnid"] == WNIDS[0]][:4]
    (tmp_path / "exclude.txt").write_text("".join(f"{r['wnid']}\t{r['name']}\n" for r in listed))
    assert shard(source, tmp_path / "b", "--val-per-class", "6", "--exclude", str(tmp_path / "exclude.txt")) == 0
    assert {r["key"] for r in ledger(tmp_path / "b") if r["action"] == "held_out"} == held_out


def test_a_limit_per_class_does_not_hide_rejects(tmp_path, capsys):
    bad = {f"{WNIDS[0]}_bad{i}.JPEG": b"<html>" for i in range(12)}
    source = archive(tmp_path / "s.tar", count=40, extra=bad)
    assert shard(source, tmp_path / "out", "--max-images-per-class", "8") == 3
    counted = int(re.search(r" of (\d+) images are rejected", one_error_line(capsys))[1])
    assert counted <= 48  # at most 8 of each class and chunk were looked at, of 132


def test_a_class_with_validation_images_only_in_an_empty_training_folder(tmp_path):
    for split, wnid, count in (
        ("train", WNIDS[0], 4),
        ("train", WNIDS[1], 0),
        ("val", WNIDS[0], 2),
        ("val", WNIDS[1], 2),
    ):
        folder = tmp_path / "set" / split / wnid
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{wnid}_{split}{i}.JPEG").write_bytes(image_bytes(int(wnid[1:]) * 100 + i + len(split)))
    assert shard(tmp_path / "set", tmp_path / "out") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.split("train").class_counts == [0, 4]
    assert manifest.split("val").class_counts == [2, 2]


def test_a_validation_source_with_training_images_is_refused(tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / "set" / split / WNIDS[0]).mkdir(parents=True)
        (tmp_path / "set" / split / WNIDS[0] / "a.JPEG").write_bytes(image_bytes(1))
    source = archive(tmp_path / "s.tar")
    assert shard(source, tmp_path / "out", "--val-source", str(tmp_path / "set")) == 1
    assert "holds training images too: give its folder val as --val-source" in one_error_line(capsys)


def test_odd_names_and_paths(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "s.tar", extra={"a[/b]0.JPEG": image_bytes(1), "[bold].JPEG": b""})
    assert shard("s.tar", "out [/x]", "--max-reject", "1", "--workers", "2") == 0
    assert "[bold].JPEG" in capsys.readouterr().out
    assert main(["verify", "out [/x]", "--workers", "1"]) == 0
    assert main(["verify", "out [/x]", "--fast", "--workers", "1"]) == 0
    assert shard("s.tar", "") == 1
    assert "--output is empty" in one_error_line(capsys)
    (tmp_path / "file").write_text("x")
    assert shard("s.tar", "file") == 1
    assert "file: Not a directory): choose another --output" in one_error_line(capsys)


@pytest.mark.parametrize("damage", ["lost outer header", "lost bytes"])
def test_salvage_finds_classes_that_no_header_tells_of(tmp_path, damage):
    tar = bytearray(archive(tmp_path / "s.tar").read_bytes())
    at = tar.index(f"{WNIDS[1]}.tar".encode())
    if damage == "lost outer header":
        tar[at : at + 512] = b"\x07" * 512
    else:
        del tar[at - 6000 : at - 3440]
    (tmp_path / "s.tar").write_bytes(tar)
    assert shard(tmp_path / "s.tar", tmp_path / "out") == 3
    assert shard(tmp_path / "s.tar", tmp_path / "out", "--salvage", "--max-reject", "1") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.synsets == sorted(WNIDS)
    assert manifest.split("train").samples >= 30
