"""`verify` on data sets of masks or boxes: whole ones, and what is wrong with others."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.cluster import InProcess
from data_prep.dense_set import DenseIndex, DenseManifest
from data_prep.manifest import ShardEntry
from data_prep.shards.tar import MemberTar
from data_prep.storage import Folder
from data_prep.verify.dense import verify_dense
from tests.support.dense_sources import ade_source, coco_source, jpeg, png


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    for kind, source in (("ade20k", ade_source(root / "ade")), ("coco", coco_source(root / "co"))):
        command = ["shard-dense", f"--{kind}", str(source), "--output", str(root / kind), "--workers", "1"]
        assert main([*command, "--samples-per-shard", "4"]) == 0
    return root


@pytest.fixture
def folder(whole: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return Path(shutil.copytree(whole / request.param, tmp_path / "set"))


def problems(folder: Path, fast: bool = False) -> list[str]:
    report = verify_dense(Folder(folder), InProcess(), fast=fast)
    return [f"{problem.file}: {problem.text}" for problem in report.problems]


@pytest.mark.parametrize("folder", ["ade20k", "coco"], indirect=True)
def test_whole_sets_and_damaged_files(folder, capsys):
    assert main(["verify", str(folder), "--workers", "1"]) == 0
    assert "is whole: 2 splits, 4 shards, 12 samples (decoded)" in capsys.readouterr().out
    assert problems(folder, fast=True) == []

    shard = folder / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # of the padding: only the checksum knows
    shard.write_bytes(data)
    assert problems(folder) == [
        "train-000001.tar: differs from its sha256 in dataset.json: some of its bytes have changed",
        "train-000001.tar: has a damaged tar header at byte "
        f"{DenseIndex.load(folder / 'train-000001.index.npz').end() // 512 * 512 + 512}, the rest is no tar",
    ]
    shard.unlink()
    (folder / "train-000000.index.npz").unlink()
    (folder / "train-000009.tar").touch()
    told = "\n".join(problems(folder))
    assert "train-000001.tar: is missing" in told
    assert "train-000000.index.npz is missing" in told
    assert "train-000009.tar: is not listed in dataset.json" in told
    (folder / "ledger.parquet").unlink()
    assert main(["verify", str(folder), "--workers", "1"]) == 1
    shown = capsys.readouterr().out
    assert "ledger.parquet: cannot be read" in shown
    assert "is NOT whole" in shown


def rewritten(folder: Path, name: str, members: dict[str, bytes], samples: int) -> None:
    """Put another shard in the place of one, with the manifest's entry of it, but not its index."""
    with open(folder / name, "wb") as file:
        tar = MemberTar(file)
        for member, data in members.items():
            tar.add_member(member, data)
        tar.finish()
    entry = ShardEntry(file=name, samples=samples, bytes=tar.bytes, sha256=tar.digest.hexdigest())
    raw = json.loads((folder / "dataset.json").read_bytes())
    for split in raw["splits"].values():
        split["shards"] = [entry.model_dump() if each["file"] == name else each for each in split["shards"]]
        split["samples"] = sum(each["samples"] for each in split["shards"])
    (folder / "dataset.json").write_text(json.dumps(raw))


def described(**changes: Any) -> bytes:
    return json.dumps({"image_id": 1, "file_name": "a.jpg", "width": 40, "height": 30, **changes}).encode()


@pytest.mark.parametrize("folder", ["ade20k"], indirect=True)
def test_masks_that_cannot_be(folder):
    labels = np.zeros((30, 40), np.uint8)
    labels[0, 0] = 3
    members = {
        "a.jpg": jpeg(40, 30, 1),
        "a.png": png(labels),
        "a.json": described(scene=None),
        "b.jpg": jpeg(40, 30, 1),
        "b.png": png(labels[:, 1:]),
        "b.json": described(width=41),
        "c.jpg": jpeg(40, 30, 1)[:-200],
        "c.png": b"no PNG",
        "c.json": b"{}",
        "d.jpg": jpeg(40, 30, 1),
        "d.json": described(),
    }
    rewritten(folder, "val-000000.tar", members, 3)
    told = "\n".join(problems(folder))
    for text in (
        "val-000000.tar: a.png has the label 3, there are 3 classes",
        "val-000000.tar: b.png has 39 x 30 pixels, the image 40 x 30",
        "val-000000.tar: b.json says 41 x 30 pixels, the image has 40 x 30",
        "val-000000.tar: c.jpg cannot be decoded",
        "val-000000.tar: c.png cannot be decoded",
        "val-000000.tar: c.json is not a sample's JSON",
        "val-000000.tar: d has jpg, json, not jpg, json, png",
        "val-000000.index.npz: a is not at its place in the index",
        "dataset.json: says 3 as the number of images of wall in val; the shards hold 2",
    ):
        assert text in told, told


@pytest.mark.parametrize("folder", ["coco"], indirect=True)
def test_annotations_that_cannot_be(folder):
    right = {"id": 1, "label": 0, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0, "segmentation": None}
    wrong = [
        {"label": 3},
        {"bbox": [1, 1, 5]},
        {"bbox": [40, 1, 5, 5]},
        {"segmentation": {"size": [30, 40], "counts": "0"}},
        {"segmentation": {"size": [30, 40], "counts": "é"}},
        {"iscrowd": 2},
    ]
    annotations = [right, *({**right, "id": number, **change} for number, change in enumerate(wrong, 2))]
    rewritten(folder, "train-000000.tar", {"a.jpg": jpeg(40, 30, 1), "a.json": described(annotations=annotations)}, 1)
    told = problems(folder)
    assert sum(" annotation " in line for line in told) == len(wrong)
    shown = "\n".join(told)
    for text in (
        "a.json has label 3, there are 3 classes, in annotation 2",
        "has no box, area or iscrowd, in annotation 3",
        "has a box outside of the image (40, 1, 5 x 5), in annotation 4",
        "has a mask that is not of the image's size, in annotation 5",
        "has a mask that cannot be read",
        "ledger.parquet: has 4 rows for train-000000.tar, dataset.json says 1 samples",
    ):
        assert text in shown, shown


def test_a_manifest_of_no_use(tmp_path):
    (tmp_path / "dataset.json").write_text('{"kind": "dense"}')
    (told,) = problems(tmp_path)
    assert "is not a valid manifest" in told
    with pytest.raises(ValueError, match="not a valid manifest"):
        DenseManifest.load(tmp_path)
