"""Samples out of the shards of an instance set: as they were given, in the order of training; damage by its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.__main__ import main as prepare
from data_prep.dense_set import DenseManifest
from pipeline.config.detect import DetectConfig
from pipeline.config.load import load
from pipeline.config.sections import ConfigError
from pipeline.data.shards import DataError
from pipeline.dense.data import DenseReader
from pipeline.dense.opened import dense_order
from pipeline.detection.data import objects_of, training_views, validation_images
from pipeline.detection.opened import open_instances, open_measured
from pipeline.ranks.collectives import Ranks
from tests.support.dense_sets import build_instances, build_semantic, coco_folder


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_instances(tmp_path_factory.mktemp("instances"))


def configured(folder: Path, *more: str) -> DetectConfig:
    small = ("data.resolution=64", "train.global_batch=8", "train.micro_batch=2")
    return load("configs/demo_detect.yaml", [f"data.path={folder}", *small, *more], DetectConfig)


def test_images_and_objects_are_those_of_the_source(boxes: Path) -> None:
    reader = DenseReader(str(boxes), open_instances(configured(boxes)), "val")
    source = boxes.parent / "coco"
    told = json.loads((source / "annotations" / "instances_val2017.json").read_text())["annotations"]
    assert len(reader) == 7
    for sample in range(len(reader)):
        found = reader.annotated(sample)
        pixels = np.array(Image.open(source / "val2017" / f"{found.image_id:012d}.jpg"))
        assert np.array_equal(found.image.permute(1, 2, 0).numpy(), pixels)
        wanted = [each for each in told if each["image_id"] == found.image_id]
        assert len(found.annotations) == len(wanted) == (0 if found.image_id == 5 else 3)
        objects = objects_of(found.annotations, *pixels.shape[:2], masks=True)
        assert objects.masks is not None
        assert objects.labels.tolist() == ([0, 1] if wanted else [])  # the crowd is no target
        for (x0, y0, x1, y1), mask, each in zip(objects.boxes.int().tolist(), objects.masks, wanted, strict=False):
            assert [x0, y0, x1 - x0, y1 - y0] == each["bbox"]
            assert int(mask.sum()) == each["area"] == int(mask[y0:y1, x0:x1].sum())
        assert objects_of(found.annotations, *pixels.shape[:2], masks=False).masks is None


@pytest.mark.parametrize("workers", [0, 1])
def test_ranks_and_workers_share_one_order(boxes: Path, workers: int) -> None:
    """Two ranks have what one has, view by view; a run that goes on has what it would have had."""
    config = configured(boxes, f"data.workers_per_rank={workers}")
    manifest = open_instances(config)
    order, reader = dense_order(config, manifest), DenseReader(str(boxes), manifest, "train")
    alone = list(training_views(config, reader, order, Ranks(), 3, 6))
    assert len(alone) == 3 * 4
    ranks = [list(training_views(config, reader, order, Ranks(rank, 2), 3, 6)) for rank in range(2)]
    together = [batch for step in range(3) for rank in ranks for batch in rank[2 * step : 2 * step + 2]]
    for one, other in zip(alone, together, strict=True):
        assert one.counts == other.counts
        for mine, theirs in zip(one[:4], other[:4], strict=True):
            assert torch.equal(mine, theirs)  # type: ignore[arg-type]
        assert torch.equal(one.samples, other.samples)
        scenes = one.on(torch.device("cpu"))
        assert (scenes.images.shape, scenes.images.dtype) == ((2, 3, 64, 64), torch.float32)
        assert [len(each.labels) for each in scenes.objects] == list(one.counts)
        assert all(each.masks is not None and len(each.masks) == len(each.boxes) for each in scenes.objects)
    assert 0 < sum(sum(batch.counts) for batch in alone) <= 2 * 2 * len(alone)
    seen = [list(validation_images(config, DenseReader(str(boxes), manifest, "val"), Ranks(r, 2))) for r in (0, 1)]
    assert [[each.sample for each in part] for part in seen] == [[0, 2, 4, 6], [1, 3, 5]]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["image", "json"])
def test_damage_is_told_by_shard_and_key(boxes: Path, tmp_path: Path, part: str, workers: int) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(boxes, damaged)
    config = configured(damaged, f"data.workers_per_rank={workers}")
    manifest = DenseManifest.load(damaged)
    entry = manifest.split("val").shards[0]
    index = manifest.load_index(damaged, entry)
    with open(damaged / entry.file, "r+b") as file:
        file.seek(int(getattr(index, f"{part}_offset")[2]))
        file.write(bytes(64))
    images = validation_images(config, DenseReader(str(damaged), manifest, "val"), Ranks())
    with pytest.raises(DataError, match=f"{entry.file}: sample '{index.keys[2]}'.*cannot be read"):
        list(images)


def test_sets_that_cannot_be_learned_from(boxes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has masks of classes: `detect` takes a set with objects, made by .*--coco"):
        open_instances(configured(build_semantic(tmp_path)))
    alone = build_instances(tmp_path, masks=False)
    with pytest.raises(ConfigError, match=r"has boxes without masks, and model.masks is true: set model.masks=false"):
        open_instances(configured(alone))
    assert open_instances(configured(alone, "model.masks=false")).num_classes == 2
    assert open_measured(configured(alone)).num_classes == 2, "boxes are measured on it, whatever the net finds besides"
    for split, told in (("val", "evaluate.every_epochs is 2: set it to null"), ("train", "there is nothing to learn")):
        other = tmp_path / split
        shutil.copytree(boxes, other)
        tree = json.loads((other / "dataset.json").read_text())
        tree["splits"][split]["class_annotations"] = [0, 0]
        (other / "dataset.json").write_text(json.dumps(tree))
        with pytest.raises(ConfigError, match=told):
            open_instances(configured(other))


def test_validation_images_of_crowds_alone(tmp_path: Path) -> None:
    """They count in no score: said before the run, not at its first evaluation."""
    source = coco_folder(tmp_path / "coco", train=5, val=4)
    file = source / "annotations" / "instances_val2017.json"
    told = json.loads(file.read_text())
    told["annotations"] = [each | {"iscrowd": 1} for each in told["annotations"]]
    file.write_text(json.dumps(told))
    assert prepare(["shard-dense", "--coco", str(source), "--output", str(tmp_path / "set"), "--workers", "1"]) == 0
    config = configured(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"no objects, crowds aside, in its validation images and evaluate\.every_ep"):
        open_instances(config)
    with pytest.raises(ConfigError, match=r"no objects, crowds aside, .*: give another set with --data"):
        open_measured(config)
