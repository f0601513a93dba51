"""Images that belong to no class, and folders that nobody means: each in the ledger, counted, and told."""

from __future__ import annotations

import gzip
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep.__main__ import main
from data_prep.manifest import Manifest
from tests.support.archives import class_images, shard, tar_bytes
from tests.support.source_forms import write, write_tree

A, B, C = "n00000001", "n00000002", "n00000003"


def rows(folder: Path) -> Counter[tuple[str, str]]:
    table = pq.read_table(folder / "ledger.parquet").to_pylist()
    return Counter((row["action"], row["reason"]) for row in table if row["name"])


def classes(*names: str, count: int = 8) -> dict[str, bytes]:
    """name/image: of classes in folders of these names, whatever is around the WordNet id."""
    found = {}
    for name in names:
        wnid = f"n{''.join(c for c in name if c.isdigit())}"
        found |= {f"{name}/{image}": data for image, data in class_images(wnid, count).items()}
    return found


def as_tars(files: dict[str, bytes]) -> dict[str, bytes]:
    folders: dict[str, dict[str, bytes]] = {}
    for path, data in files.items():
        folder, _, name = path.partition("/")
        folders.setdefault(folder, {})[name] = data
    return {f"{folder}.tar": tar_bytes(members) for folder, members in folders.items()}


FORMS = {
    "folders": lambda root, files: write_tree(root / "s", files),
    "folder of tars": lambda root, files: write_tree(root / "s", as_tars(files)),
    "tar of folders": lambda root, files: write(root / "s.tar", tar_bytes({f"set/{n}": d for n, d in files.items()})),
    "tar of tars": lambda root, files: write(root / "s.tar", tar_bytes(as_tars(files))),
    "tar.gz of tars": lambda root, files: write(root / "s.tar.gz", gzip.compress(tar_bytes(as_tars(files)))),
    "tar.gz of folders": lambda root, files: write(root / "s.tar.gz", gzip.compress(tar_bytes(files))),
}


def says(text: str, *words: str) -> None:
    assert not [word for word in words if word not in text], text


def plan(source: Path, *options: str) -> int:
    return main(["plan", "--source", str(source), "--min-side", "8", *options])


@pytest.mark.parametrize("form", FORMS)
def test_misnamed_classes_are_counted_and_can_be_renamed(tmp_path, form, capsys):
    source = FORMS[form](tmp_path, classes(A, B, f"{C}_great_white_shark", "N00000004"))
    assert shard(source, tmp_path / "out") == 3
    told = capsys.readouterr().err.splitlines()[-1]
    says(told, "50.0%", "--rename-classes", f"{C}_great_white_shark", "N00000004")
    assert plan(source) == 3
    says(capsys.readouterr().out, "50.0% unusable", "--rename-classes")
    assert shard(source, tmp_path / "kept", "--max-reject", "0.5") == 0
    assert rows(tmp_path / "kept")["rejected", "no_class"] == 16
    assert sum(rows(tmp_path / "kept").values()) == 32
    says(capsys.readouterr().out, "16 images", "--rename-classes")
    assert shard(source, tmp_path / "out", "--rename-classes", "--force") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.synsets == [A, B, C, "n00000004"]
    assert manifest.split("train").class_counts == [8] * 4
    assert plan(source, "--rename-classes") == 0
    assert "0.0% unusable" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out"), "--workers", "1"]) == 0


def test_only_misnamed_classes(tmp_path, capsys):
    """Nothing is found at all: the error offers the option, which finds all."""
    for form, pack in FORMS.items():
        source = pack(tmp_path / form.replace(" ", "-"), classes(f"{A}_tench", f"{B}_goldfish"))
        assert shard(source, tmp_path / "out") == 1
        says(capsys.readouterr().err, f"{A}_tench", "--rename-classes")
        assert shard(source, tmp_path / "out", "--rename-classes", "--force") == 0
        assert Manifest.load(tmp_path / "out").split("train").class_counts == [8, 8], form


def flat_val(root: Path, inside: str = "val") -> tuple[Path, dict[str, str]]:
    """train/ of class folders beside images right in val/, or in a folder of it; and their classes by name."""
    wnids = {f"some image {i}.JPEG": (A, B)[i % 2] for i in range(10)}
    images = list(class_images(C, 10).values())
    flat = {f"{inside}/{name}": images[i] for i, name in enumerate(wnids)}
    return write_tree(root, {**{f"train/{n}": d for n, d in classes(A, B).items()}, **flat}), wnids


@pytest.mark.parametrize("inside", ["val", "val/images"])
@pytest.mark.parametrize("form", ["folders", "tar", "tar.gz"])
def test_a_flat_val_is_an_error_and_takes_labels(tmp_path, form, inside, capsys):
    folder, wnids = flat_val(tmp_path / "set", inside)
    source = folder
    if form != "folders":
        files = {str(p.relative_to(folder.parent)): p.read_bytes() for p in sorted(folder.rglob("*.JPEG"))}
        data = tar_bytes(files)
        source = write(tmp_path / f"s.{form}", gzip.compress(data) if form == "tar.gz" else data)
    assert shard(source, tmp_path / "out") == 1
    told = capsys.readouterr().err.splitlines()[-1]
    says(told, "split val", "--val-labels", "some image 0.JPEG")
    labels = write(tmp_path / "labels.txt", "".join(f"{n} {w}\n" for n, w in wnids.items()).encode())
    assert shard(source, tmp_path / "out", "--val-labels", str(labels), "--force") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.split("val").class_counts == [5, 5]
    assert manifest.split("train").class_counts == [8, 8]
    assert shard(source, tmp_path / "out", "--val-labels", str(labels)) == 0
    assert plan(source, "--val-labels", str(labels)) == 0
    one_less = write(tmp_path / "less.txt", "".join(f"{n} {w}\n" for n, w in list(wnids.items())[1:]).encode())
    assert shard(source, tmp_path / "out2", "--val-labels", str(one_less)) == 1
    assert "has no line for the image" in capsys.readouterr().err


def test_a_flat_val_as_a_source_of_its_own(tmp_path, capsys):
    folder, wnids = flat_val(tmp_path / "set", "val/images")
    labels = write(tmp_path / "l.txt", "".join(f"{n}\t{w}\t0\t0\t62\t62\n" for n, w in wnids.items()).encode())
    packed = write(tmp_path / "v.tar", tar_bytes({f"v/{p.name}": p.read_bytes() for p in folder.rglob("some*")}))
    for number, val in enumerate((folder / "val", packed)):
        options = ("--val-source", str(val), "--val-labels", str(labels))
        assert shard(folder / "train", tmp_path / f"out{number}", *options) == 0
        assert Manifest.load(tmp_path / f"out{number}").split("val").class_counts == [5, 5]
    assert shard(folder / "train", tmp_path / "out", "--val-source", str(folder / "val")) == 1
    assert shard(folder / "train", tmp_path / "out", "--val-labels", str(labels)) == 1
    assert "leave out the labels" in capsys.readouterr().err.splitlines()[-1]


def test_a_val_that_comes_out_empty(tmp_path, capsys):
    source = write_tree(tmp_path / "s", {**classes(A, B), f"{C}/x.JPEG": b"not one"})
    train = write_tree(tmp_path / "one", classes(A, B, count=1))
    assert shard(train, tmp_path / "out", "--val-per-class", "3") == 1
    says(capsys.readouterr().err, "no usable validation images", "--val-per-class")
    other = write_tree(tmp_path / "v", classes("n00000009"))
    assert shard(source, tmp_path / "out", "--val-source", str(other), "--force") == 1
    assert "n00000009, is in train" in capsys.readouterr().err
    only_train = write(tmp_path / "t.tar", tar_bytes({f"train/{n}": d for n, d in classes(A, B).items()}))
    assert shard(only_train, tmp_path / "out", "--force") == 0
    assert list(Manifest.load(tmp_path / "out").splits) == ["train"]


HIDDEN = (".ipynb_checkpoints", ".Trash-0", "@eaDir", "__MACOSX", ".git/x")


@pytest.mark.parametrize("form", FORMS)
def test_hidden_folders_are_no_images(tmp_path, form):
    files = classes(A, B)
    extra = list(class_images(C, 2 * len(HIDDEN)).values())
    files |= {f"{A}/{folder}/a.JPEG": extra[i] for i, folder in enumerate(HIDDEN)}
    if "tars" not in form:
        files |= {f"{folder}/{C}/b.JPEG": extra[i + len(HIDDEN)] for i, folder in enumerate(HIDDEN)}
    source = FORMS[form](tmp_path, files)
    if form == "folder of tars":
        shutil.copytree(source, tmp_path / "t" / ".Trash-0")
        shutil.copytree(tmp_path / "t" / ".Trash-0", source / ".Trash-0")
    if form == "tar of tars":
        source = write(tmp_path / "s.tar", tar_bytes({**as_tars(files), f".Trash-0/{C}.tar": tar_bytes({"x": b"1"})}))
    assert shard(source, tmp_path / "out") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.synsets == [A, B]
    assert manifest.split("train").class_counts == [8, 8]
    found = rows(tmp_path / "out")
    assert found["skipped", "hidden"] >= len(HIDDEN) * (1 if "tars" in form else 2)


@pytest.mark.parametrize("size", [0, 100, 512, 700])
@pytest.mark.parametrize("form", ["folder of tars", "tar of tars", "tar.gz of tars"])
def test_a_tar_that_holds_nothing_is_damaged(tmp_path, form, size, capsys):
    tars = as_tars(classes(A, B))
    tars[f"{C}.tar"] = tar_bytes(class_images(C, 3))[:size]
    data = tar_bytes(tars)
    source = write_tree(tmp_path / "s", tars) if form == "folder of tars" else tmp_path / "s.tar"
    if form != "folder of tars":
        write(source, gzip.compress(data) if "gz" in form else data)
    assert shard(source, tmp_path / "out") == 3
    told = capsys.readouterr().err.splitlines()[-1]
    says(told, "damaged in 1 place(s)", f"{C}.tar")
    (tmp_path / "empty").mkdir()
    whole = write_tree(tmp_path / "empty" / "s", {**tars, f"{C}.tar": tar_bytes({})})
    assert shard(whole, tmp_path / "out2") == 0  # whose end marks say that it is whole


def test_a_test_folder_is_left_out_as_meant(tmp_path):
    files = {f"train/{n}": d for n, d in classes(A).items()} | {f"val/{n}": d for n, d in classes(A, count=2).items()}
    files |= {f"test/{i}.JPEG": data for i, data in enumerate(class_images(B, 20).values())}
    for number, source in enumerate(
        (write_tree(tmp_path / "s", files), write(tmp_path / "s.tar", tar_bytes(dict(sorted(files.items())))))
    ):
        kind = ("--source-kind", "split-folders" if number == 0 else "tar-of-class-folders")
        assert shard(source, tmp_path / f"out{number}", *kind, "--duplicates", "keep") == 0
        assert rows(tmp_path / f"out{number}")["skipped", "test_split"] == 20


def test_classes_both_packed_and_unpacked(tmp_path):
    files = classes(A, B)
    source = write_tree(tmp_path / "s", {**as_tars(files), **{n: d for n, d in files.items() if n.startswith(A)}})
    assert shard(source, tmp_path / "out") == 0
    assert rows(tmp_path / "out") == {("kept", ""): 16, ("skipped", "class_in_tar"): 8}


@pytest.mark.parametrize("form", ["folders", "tar of folders", "tar.gz of folders"])
@pytest.mark.parametrize(("train", "val"), [("training", "valid"), ("Train", "Val_Images"), ("train", "valid2")])
def test_a_split_by_another_name_is_no_loss(tmp_path, form, train, val, capsys):
    """Taken for what it is, or refused, however few its images are."""
    files = {f"{train}/{n}": d for n, d in classes(A, B, count=30).items()}
    files |= {f"{val}/{A}/v{n}": d for n, d in class_images("n00000007", 1).items()}
    source = FORMS[form](tmp_path, files)
    if val != "valid2":
        assert shard(source, tmp_path / "out") == 0
        assert Manifest.load(tmp_path / "out").split("val").class_counts == [1, 0]
        return
    for command in (lambda: shard(source, tmp_path / "out"), lambda: plan(source)):
        assert command() == 1
        says(capsys.readouterr().err.splitlines()[-1], "valid2 holds class folders", "rename")
    assert not (tmp_path / "out" / "dataset.json").exists()
    if form == "folders":
        assert shard(source / "train", tmp_path / "out", "--val-source", str(source / "valid2"), "--force") == 0


def test_a_split_beside_classes_is_no_loss(tmp_path, capsys):
    files = classes(A, B, count=30) | {f"val/{A}/v{n}": d for n, d in class_images("n00000007", 1).items()}
    source = write_tree(tmp_path / "s", files)
    for command in (lambda: shard(source, tmp_path / "out"), lambda: plan(source)):
        assert command() == 1
        says(capsys.readouterr().err.splitlines()[-1], "s/val holds class folders", "--val-source")
    files = {f"train/{name}": data for name, data in classes(A, B, count=30).items()}
    files |= {f"train/more/{A}/x{n}": d for n, d in class_images(C, 1).items()}
    assert shard(write_tree(tmp_path / "in-train", files), tmp_path / "out") == 0  # told as lost
    says(capsys.readouterr().out, "1 images", f"lie in no class, such as train/more/{A}/x")


def test_validation_that_cannot_be_is_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    """Train's own place, or labels of other classes."""
    folders = write_tree(tmp_path / "s", classes(A, B))
    tars = write_tree(tmp_path / "t", as_tars(classes(A, B)))
    val = write_tree(tmp_path / "v", {f"{i}.JPEG": d for i, d in enumerate(class_images(C, 2).values())})
    labels = write(tmp_path / "labels.txt", f"0.JPEG {C}\n1.JPEG {C}\n".encode())
    copied = shutil.copytree(folders, tmp_path / "copy")
    assert shard(folders, tmp_path / "out", "--val-source", str(copied)) == 1
    says(capsys.readouterr().err, "all 16 have the same bytes as a validation image")
    monkeypatch.setattr("data_prep.build.shards._ingest", None)
    (tmp_path / "link").symlink_to(folders)
    assert shard(folders, tmp_path / "out2", "--val-source", str(tmp_path / "link")) == 1
    says(capsys.readouterr().err, "--val-source and --source are both")
    for source in (folders, tars):
        assert shard(source, tmp_path / "out2", "--val-source", str(val), "--val-labels", str(labels)) == 1
        says(capsys.readouterr().err, f"none of its 1 classes, such as {C}, is in train, whose first is {A}")
