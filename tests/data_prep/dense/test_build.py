"""What comes out of ADE20K and COCO: the right pixels, masks and boxes; from folders and zips; after a kill."""

import io
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import COCO as FasterCOCO
from faster_coco_eval import COCOeval_faster
from PIL import Image
from pycocotools import mask as reference
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data_prep.__main__ import main
from data_prep.dense_set import DenseManifest
from tests.support.dense_sources import (
    CATEGORIES,
    CLASSES,
    ade_mask,
    ade_name,
    ade_source,
    coco_source,
    samples,
    zipped,
)

SMALL = ("--samples-per-shard", "2", "--workers", "1")


def shard(source: Path, output: Path, *options: str) -> DenseManifest:
    kind = "--coco" if "coco" in source.name else "--ade20k"
    assert main(["shard-dense", kind, str(source), "--output", str(output), "--name", "set", *SMALL, *options]) == 0
    return DenseManifest.load(output)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def test_ade20k(tmp_path):
    source = ade_source(tmp_path / "ADEChallengeData2016")
    manifest = shard(source, tmp_path / "out")
    assert (manifest.task, manifest.classes, manifest.category_ids) == ("semantic", list(CLASSES), [1, 2, 3])
    for split, count in (("train", 9), ("val", 3)):
        found = samples(tmp_path / "out", manifest, split)
        assert sorted(sample["key"] for sample in found) == [ade_name(split, number) for number in range(1, count + 1)]
        assert ([sample["key"] for sample in found] == sorted(sample["key"] for sample in found)) == (split == "val")
        pixels = np.zeros(3, np.int64)
        for sample in found:
            told = sample["json"]
            name = ade_name(split, told["image_id"])
            assert told["file_name"] == f"{name}.jpg"
            assert told["scene"] == {"ADE_train_00000001": "airport_terminal", "ADE_val_00000001": "bathroom"}.get(name)
            folder = source / "images" / {"train": "training", "val": "validation"}[split]
            assert sample["jpeg"] == (folder / told["file_name"]).read_bytes()
            labels = np.array(Image.open(io.BytesIO(sample["mask"])))
            values = ade_mask(split, told["image_id"])
            assert labels.dtype == np.uint8
            assert np.array_equal(labels == 255, values == 0)
            assert np.array_equal(labels[values > 0], values[values > 0] - 1)
            pixels += np.bincount(values.ravel(), minlength=4)[1:]
        assert manifest.splits[split].class_pixels == pixels.tolist()
        assert manifest.splits[split].class_images == [count] * 3
    with tarfile.open(tmp_path / "out" / "val-000000.tar") as tar:
        first = ade_name("val", 1)
        assert tar.getnames()[:3] == [f"{first}.jpg", f"{first}.png", f"{first}.json"]


def test_coco_as_pycocotools_reads_it(tmp_path):
    source = coco_source(tmp_path / "coco")
    manifest = shard(source, tmp_path / "out")
    assert (manifest.task, manifest.category_ids) == ("instance", list(CATEGORIES))
    assert manifest.classes == list(CATEGORIES.values())
    for split, count in (("train", 9), ("val", 3)):
        truth = COCO(str(source / "annotations" / f"instances_{split}2017.json"))
        found = samples(tmp_path / "out", manifest, split)
        ids = [sample["json"]["image_id"] for sample in found]
        assert sorted(ids) == sorted(truth.getImgIds())
        assert (ids == sorted(ids)) == (split == "val")
        of_class = np.zeros(3, np.int64)
        for sample in found:
            told = sample["json"]
            assert sample["jpeg"] == (source / f"{split}2017" / told["file_name"]).read_bytes()
            assert sample["mask"] == b""
            expected = {each["id"]: each for each in truth.loadAnns(truth.getAnnIds(told["image_id"]))}
            assert [each["id"] for each in told["annotations"]] == sorted(expected)
            for each in told["annotations"]:
                wanted = expected[each["id"]]
                assert manifest.category_ids[each["label"]] == wanted["category_id"]
                assert (each["bbox"], each["area"], each["iscrowd"]) == (
                    wanted["bbox"],
                    wanted["area"],
                    wanted["iscrowd"],
                )
                assert np.array_equal(reference.decode(each["segmentation"]), truth.annToMask(wanted))
                assert each["segmentation"]["counts"].encode() == truth.annToRLE(wanted)["counts"]
                of_class[each["label"]] += 1
        assert manifest.splits[split].class_annotations == of_class.tolist()
        assert len(truth.anns) == of_class.sum() >= count


@pytest.mark.parametrize("kind", ["ade20k", "coco"])
def test_archives_as_published_give_the_same_shards(tmp_path, kind):
    archives = tmp_path / f"{kind}-zips"
    if kind == "ade20k":
        source = ade_source(tmp_path / "ADEChallengeData2016")
        zipped(source, archives / "ADEChallengeData2016.zip", "ADEChallengeData2016/")
    else:
        source = coco_source(tmp_path / "coco")
        zipped(source / "annotations", archives / "annotations_trainval2017.zip", "annotations/")
        for split in ("train", "val"):
            zipped(source / f"{split}2017", archives / f"{split}2017.zip", f"{split}2017/")
    plain = shard(source, tmp_path / "a")
    packed = shard(archives, tmp_path / "b")
    assert plain.splits == packed.splits
    assert plain.dataset_id == packed.dataset_id
    if kind == "ade20k":
        assert shard(archives / "ADEChallengeData2016.zip", tmp_path / "c").splits == plain.splits


# Runs shard-dense, and kills its own process at the nth image, or the nth small file with a given text in its name.
DYING = """
import os, signal, sys
import data_prep.dense.shard as shard
from data_prep.__main__ import main
from data_prep.storage import Folder

what, number, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
calls = 0

def dying(function, wanted):
    def called(*args):
        global calls
        calls += wanted(*args)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return called

if what == "image":
    shard.make_sample = dying(shard.make_sample, lambda *_: 1)
else:
    Folder.write = dying(Folder.write, lambda folder, name, data: what in name)
main(arguments)
"""


@pytest.mark.parametrize("kind", ["ade20k", "coco"])
def test_two_workers_and_three_kills_give_the_same_bytes(tmp_path, kind):
    source = (ade_source if kind == "ade20k" else coco_source)(tmp_path / kind, 30, 9)
    shard(source, tmp_path / "plain")
    expected = content(tmp_path / "plain")
    assert len(expected) == 2 + 2 * (15 + 5)

    killed = tmp_path / "killed"
    command = ["shard-dense", f"--{kind}", str(source), "--output", str(killed), "--name", "set", *SMALL]
    done: dict[str, int] = {}
    # In the second image of a shard; when a shard has its name but its record has not; before the manifest.
    for what, number, shards in (("image", 6, 2), ("dense-shards", 4, 6), ("dataset.json", 1, 20)):
        run = subprocess.run(
            [sys.executable, "-c", DYING, what, str(number), *command], capture_output=True, check=False
        )
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert not (killed / "dataset.json").exists()
        there = {path.name: path.stat().st_mtime_ns for path in killed.glob("*.tar")}
        assert len(there) == shards
        assert there.items() >= done.items(), "finished shards stay as they are"
        noted = {path.stem for path in (killed / ".data_prep" / "dense-shards").glob("*.json")}
        assert len(noted) == shards - (what == "dense-shards")
        assert bool(list(killed.glob(".*.tmp-*"))) == (what == "image")
        done = {name: time for name, time in there.items() if name in noted}
    shard(source, killed)
    assert content(killed) == expected
    assert {path.name for path in killed.iterdir()} == expected.keys()

    shard(source, tmp_path / "two", "--workers", "2")
    assert content(tmp_path / "two") == expected


def test_what_is_there_already(tmp_path, capsys):
    source = coco_source(tmp_path / "coco")
    first = shard(source, tmp_path / "out")
    before = content(tmp_path / "out")
    capsys.readouterr()
    assert shard(source, tmp_path / "out") == first
    assert "already built: set" in capsys.readouterr().out
    assert content(tmp_path / "out") == before
    again = ["shard-dense", "--coco", str(source), "--output", str(tmp_path / "out"), "--name", "set", *SMALL]
    assert main([*again, "--seed", "1"]) == 1
    assert "seed (0 there, 1 now)" in capsys.readouterr().err
    (source / "train2017" / "000000000011.jpg").write_bytes(b"another")
    assert main(again) == 1
    assert "other settings: source (" in capsys.readouterr().err
    assert main([*again, "--force", "--max-reject", "1"]) == 0
    assert DenseManifest.load(tmp_path / "out").splits["train"].samples == 8
    another = shard(source, tmp_path / "seed", "--seed", "1", "--max-reject", "1")
    order = [sample["key"] for sample in samples(tmp_path / "seed", another, "train")]
    now = DenseManifest.load(tmp_path / "out")
    assert order != [sample["key"] for sample in samples(tmp_path / "out", now, "train")]


def test_one_split_and_the_plan(tmp_path, capsys):
    source = coco_source(tmp_path / "coco")
    assert main(["shard-dense", "--coco", str(source), "--plan"]) == 0
    told = capsys.readouterr().out
    assert "train: 9 images" in told
    assert "3 images without any" in told  # of train: the last, and each fourth
    assert "plan: about" in told
    assert list(shard(source, tmp_path / "out", "--splits", "val").splits) == ["val"]


def test_commands_for_classified_images_say_what_it_is(tmp_path, capsys):
    source = coco_source(tmp_path / "coco")
    shard(source, tmp_path / "out")
    capsys.readouterr()
    out = str(tmp_path / "out")
    for command in (
        ["duplicates", out, "--within"],
        ["index", out],
        ["index", "--upgrade", out],
        ["labels", out, "imagenet-1k"],
    ):
        assert main(command) == 1, command
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert "is a data set of masks or boxes" in error, command


@pytest.mark.parametrize("evaluator", [(COCO, COCOeval), (FasterCOCO, COCOeval_faster)], ids=["pycocotools", "faster"])
def test_the_truth_itself_scores_one(tmp_path, evaluator):
    """With ids, areas, crowds and images without annotation as they come out of the shards."""
    manifest = shard(coco_source(tmp_path / "coco", 2, 12), tmp_path / "out")
    found = [sample["json"] for sample in samples(tmp_path / "out", manifest, "val")]
    truth = [{**each, "image_id": told["image_id"]} for told in found for each in told["annotations"]]
    truth = [{**each, "category_id": manifest.category_ids[each["label"]]} for each in truth]
    assert 0 < sum(each["iscrowd"] for each in truth) < len(truth)
    names = [{"id": number, "name": name} for number, name in zip(manifest.category_ids, manifest.classes, strict=True)]
    images = [{"id": told["image_id"], "width": told["width"], "height": told["height"]} for told in found]
    dataset, evaluation = evaluator
    reader = dataset()
    reader.dataset = {"images": images, "annotations": truth, "categories": names}
    reader.createIndex()
    for kind in ("bbox", "segm"):
        fields = ("image_id", "category_id", "bbox", "segmentation")
        result = reader.loadRes([{**{name: each[name] for name in fields}, "score": 0.5} for each in truth])
        scored = evaluation(reader, result, kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
        assert scored.stats[0] == pytest.approx(1, abs=1e-9), kind
