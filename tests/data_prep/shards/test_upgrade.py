"""`index --upgrade`: a set of format 1 gets what came with format 2, whatever interrupts it, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.build import shards as build
from data_prep.manifest import Manifest, ManifestError, ShardIndex, index_path
from data_prep.storage import Folder
from data_prep.writer import sole_writer
from tests.former.former_commands import shards_build
from tests.support.former import unpack_former
from tests.support.object_store import ObjectStore

SHARDS = ("train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by former code; without its `.beton`, which is none of what changes."""
    folder = unpack_former(tmp_path_factory.mktemp("former"), ["data"]) / "data" / "in22k"
    manifest = Manifest.load(folder)
    for split in manifest.splits.values():
        split.betons.clear()
    manifest.save(folder)
    for beton in folder.glob("*.beton"):
        beton.unlink()
    return folder


@pytest.fixture(scope="module")
def upgraded(former: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed upgrade gives, which tests/former compares with a fresh build."""
    folder = Path(shutil.copytree(former, tmp_path_factory.mktemp("upgraded") / "set"))
    assert upgrade(folder) == 0
    return folder


@pytest.fixture
def data(former: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(former, tmp_path / "set"))


def upgrade(folder: Path | str, *options: str) -> int:
    return main(["index", str(folder), "--upgrade", *options])


def test_what_is_added(former: Path, upgraded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not (upgraded / ".data_prep").exists()
    before, after = Manifest.load(former), Manifest.load(upgraded)
    assert (before.format_version, after.format_version, after.dataset_id) == (1, 2, before.dataset_id)
    for entry, other in zip(before.split("train").shards, after.split("train").shards, strict=True):
        one, two = before.load_index(former, entry), after.load_index(upgraded, other)
        assert (one.keys == two.keys).all()
        assert (one.labels == two.labels).all()
    for folder in (former, upgraded):
        assert main(["verify", str(folder), "--workers", "1"]) == 0
    assert json.loads((upgraded / "_info.json").read_text()) == {
        "name": "in22k",
        "class_names": before.synsets,
        "num_classes": 4,
        "splits": {
            called: {
                "name": called,
                "filenames": [entry.file for entry in after.split(split).shards],
                "shard_lengths": [entry.samples for entry in after.split(split).shards],
                "num_samples": after.split(split).samples,
            }
            for called, split in (("train", "train"), ("validation", "val"))
        },
    }
    # A second time it changes nothing.
    times = {path: path.stat().st_mtime_ns for path in upgraded.iterdir()}
    capsys.readouterr()
    assert upgrade(upgraded) == 0
    assert "lacks nothing; format 2" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in upgraded.iterdir()} == times


def killed_at(rename: int, folder: Path) -> bool:
    """Run the upgrade in a process that dies in place of that rename; whether it came so far."""
    child = os.fork()
    if child == 0:
        replace, left = os.replace, iter(range(rename))

        def dying(source: Path, target: Path) -> None:
            if next(left, None) is None:
                os._exit(9)
            replace(source, target)

        os.replace = dying  # type: ignore[assignment]
        code = 1
        try:
            code = upgrade(folder)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_killed_at_any_rename(former: Path, upgraded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every shard is the old or the new one, whole; readers say what to do; the same command goes on."""
    before, wanted = digests(former), digests(upgraded)
    renames = 0
    while True:
        folder = Path(shutil.copytree(former, tmp_path / str(renames)))
        if not killed_at(renames, folder):
            break
        for name in SHARDS:
            assert digests(folder)[name] in (before[name], wanted[name])
        if renames:
            with pytest.raises(ManifestError, match=r"being upgraded, .* index --upgrade .* again, which goes on"):
                Manifest.load(folder)
        assert upgrade(folder) == 0
        assert digests(folder) == wanted
        assert not (folder / ".data_prep").exists()
        renames += 1
    assert renames == 1 + 3 * len(SHARDS) + 2  # dataset.json; index, shard, record; _info.json, dataset.json
    capsys.readouterr()


def test_what_is_done_is_not_done_again(data: Path, upgraded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert killed_at(10, data)
    assert upgrade(data) == 0
    assert "4 of 4" not in capsys.readouterr().out
    assert digests(data) == digests(upgraded)


def test_a_damaged_shard(data: Path, upgraded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named and stays as it is, and so does a set that can be read; with the shard copied anew it goes on."""
    whole = (data / SHARDS[1]).read_bytes()
    (data / SHARDS[1]).write_bytes(whole[:1000] + b"?" + whole[1001:])
    assert upgrade(data) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: {data / SHARDS[1]} is not as `shard` wrote it: it differs from the sha256 in ")
    assert (data / SHARDS[1]).read_bytes()[1000:1001] == b"?"
    assert Manifest.load(data).format_version == 1
    assert main(["verify", str(data), "--workers", "1"]) == 1
    *problems, _ = capsys.readouterr().out.splitlines()
    assert problems
    assert all(line.startswith(SHARDS[1]) for line in problems)
    (data / SHARDS[1]).write_bytes(whole)
    assert main(["verify", str(data), "--workers", "1"]) == 0
    assert upgrade(data) == 0
    assert digests(data) == digests(upgraded)


def test_lost_indexes_and_info_are_made_again(upgraded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(upgraded, tmp_path / "set"))
    (folder / "train-000001.index.npz").unlink()
    (folder / "_info.json").write_text("{}")
    assert main(["verify", str(folder), "--fast", "--workers", "1"]) == 1
    assert upgrade(folder) == 0
    assert digests(folder) == digests(upgraded)


def test_the_disk_is_looked_at_first(
    data: Path, former: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 100_000))
    assert upgrade(data) == 1
    assert f"{data} has 0.00 GB free, and the upgrade needs" in capsys.readouterr().err
    assert digests(data) == digests(former)


def test_what_is_refused(data: Path, former: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upgrade(data, "--classes", "imagenet-1k") == 1
    assert "--classes for tars of others" in capsys.readouterr().err
    with sole_writer(Folder(data)):
        assert upgrade(data) == 1
    assert "another run is writing" in capsys.readouterr().err
    assert upgrade(former.parent / "in1k") == 1
    assert "tars of others, which stay as they are" in capsys.readouterr().err
    assert upgrade(tmp_path) == 1
    assert "holds no dataset.json" in capsys.readouterr().err
    assert digests(data) == digests(former)


def test_on_an_object_store(former: Path, upgraded: Path, s3: ObjectStore) -> None:
    for path in former.iterdir():
        s3.put(f"set/{path.name}", path.read_bytes())
    assert upgrade("s3://bucket/set") == 0
    found = s3.client.list_objects_v2(Bucket="bucket")["Contents"]
    there = {
        entry["Key"].rpartition("/")[2]: s3.client.get_object(Bucket="bucket", Key=entry["Key"])["Body"].read()
        for entry in found
    }
    assert {name: hashlib.sha256(content).hexdigest() for name, content in there.items()} == digests(upgraded)


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build that has read its sources, and written no shard."""
    unpack_former(tmp_path, ["raw"])
    monkeypatch.chdir(tmp_path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "_write_shards", stop)
        assert main(command()) == 130
    return tmp_path / "data" / "in22k"


def command() -> list[str]:
    return [word if word != "both" else "webdataset" for word in shards_build()]


def test_an_unfinished_build_of_former_code_goes_on(
    interrupted: Path, former: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had written two shards, and given back the images of one."""
    reference = Path(shutil.copytree(interrupted, interrupted.parent / "reference"))
    work = interrupted / ".data_prep"
    entries = {entry.file: entry for split in Manifest.load(former).splits.values() for entry in split.shards}
    (work / "shards").mkdir()
    for name in ("val-000000.tar", "train-000000.tar"):
        for file in (name, str(index_path(name))):
            shutil.copy(former / file, interrupted / file)
        (work / "shards" / f"{name}.json").write_text(entries[name].model_dump_json())
    (work / "reclaimed.json").write_text('{"shards": 1}')
    written = []

    def watched(task: build.ShardTask) -> object:
        written.append(task.name)
        return write_shard(task)

    write_shard = build.write_shard
    monkeypatch.setattr(build, "write_shard", watched)
    assert main(command()) == 0
    assert sorted(written) == ["train-000001.tar", "train-000002.tar"]
    interrupted.rename(interrupted.parent / "went-on")
    reference.rename(interrupted)
    assert main(command()) == 0
    assert digests(interrupted.parent / "went-on") == digests(interrupted)


def test_indexes_are_as_a_build_makes_them(upgraded: Path) -> None:
    """The bytes an index points to are the images."""
    for entry in Manifest.load(upgraded).split("train").shards:
        content = (upgraded / entry.file).read_bytes()
        index = ShardIndex.load(upgraded / index_path(entry.file))
        assert all(content[offset : offset + 2] == b"\xff\xd8" for offset in index.offsets)
