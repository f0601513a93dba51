"""Samples out of the shards of a semantic set: as they were given, in the order of training; damage by its place."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.dense_set import IGNORED, DenseManifest
from data_prep.manifest import ManifestError
from pipeline.config.dense import SegmentConfig
from pipeline.config.load import load
from pipeline.data.shards import DataError
from pipeline.dense.data import DenseReader, training_crops, validation_images
from pipeline.dense.opened import check_files, dense_order, open_dense
from pipeline.ranks.collectives import Ranks
from tests.support.dense_sets import build_semantic


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_semantic(tmp_path_factory.mktemp("dense"))


def configured(squares: Path, *more: str) -> SegmentConfig:
    small = ("data.resolution=64", "augment.short_side_px=64", "train.global_batch=8", "train.micro_batch=2")
    return load("configs/demo_segment.yaml", [f"data.path={squares}", *small, *more], SegmentConfig)


def test_images_and_masks_are_those_of_the_source(squares: Path) -> None:
    reader = DenseReader(str(squares), open_dense(configured(squares)), "val")
    source = squares.parent / "ADEChallengeData2016"
    assert len(reader) == 7
    for sample in range(len(reader)):
        found = reader.labelled(sample)
        name = f"ADE_val_{sample + 1:08d}"
        mask = np.array(Image.open(source / "annotations" / "validation" / f"{name}.png"))
        wanted = np.where(mask == 0, IGNORED, mask - 1)
        assert np.array_equal(found.mask.numpy(), wanted)
        pixels = np.array(Image.open(source / "images" / "validation" / f"{name}.jpg"))
        assert np.array_equal(found.image.permute(1, 2, 0).numpy(), pixels)
        assert name in reader.describe(sample)


@pytest.mark.parametrize("workers", [0, 1])
def test_ranks_and_workers_share_one_order(squares: Path, workers: int) -> None:
    """Two ranks have what one has, crop by crop; a run that goes on has what it would have had."""
    config = configured(squares, f"data.workers_per_rank={workers}")
    manifest = open_dense(config)
    order, reader = dense_order(config, manifest), DenseReader(str(squares), manifest, "train")
    alone = list(training_crops(config, reader, order, Ranks(), 3, 6))
    assert len(alone) == 3 * 4
    ranks = [list(training_crops(config, reader, order, Ranks(rank, 2), 3, 6)) for rank in range(2)]
    together = [batch for step in range(3) for rank in ranks for batch in rank[2 * step : 2 * step + 2]]
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.samples, other.samples)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert (alone[0].images.shape, alone[0].labels.shape) == ((2, 3, 64, 64), (2, 64, 64))
    seen = [list(validation_images(config, DenseReader(str(squares), manifest, "val"), Ranks(r, 2))) for r in (0, 1)]
    assert [[each.sample for each in part] for part in seen] == [[0, 2, 4, 6], [1, 3, 5]]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["image", "mask"])
def test_damage_is_told_by_shard_and_key(squares: Path, tmp_path: Path, part: str, workers: int) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(squares, damaged)
    config = configured(damaged, f"data.workers_per_rank={workers}")
    manifest = DenseManifest.load(damaged)
    for split in ("train", "val"):
        entry = manifest.split(split).shards[0]
        index = manifest.load_index(damaged, entry)
        place = int(getattr(index, f"{part}_offset")[2])
        with open(damaged / entry.file, "r+b") as file:
            file.seek(place)
            file.write(bytes(64))
        key = str(index.keys[2])
        reader = DenseReader(str(damaged), manifest, split)
        validation = validation_images(config, reader, Ranks())
        training = training_crops(config, reader, dense_order(config, manifest), Ranks(), 0, 5)
        with pytest.raises(DataError, match=f"{entry.file}: sample '{key}'.*cannot be read"):
            list(validation if split == "val" else training)


def test_files_that_do_not_fit(squares: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    shutil.copytree(squares, short)
    manifest = DenseManifest.load(short)
    (short / "train-000001.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"train-000001.tar has 1 bytes, .* says"):
        check_files(str(short), manifest, "train")
    (short / "val-000000.index.npz").unlink()
    with pytest.raises(DataError, match=r"val-000000.index.npz is named by"):
        check_files(str(short), manifest, "val")
    with pytest.raises(ManifestError, match="does not exist"):
        open_dense(configured(tmp_path / "nowhere"))
