"""Readers: both formats give the same samples in the same batches, augmentation is keyed, damage is named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Datasets, needs_ffcv, small_run

from data_prep.manifest import Manifest
from pipeline.config import Config, load
from pipeline.data.loader import Batch, Ranks, training_batches, validation_batches
from pipeline.data.order import SampleOrder
from pipeline.data.shards import DataError, ShardImages


def configured(datasets: Datasets, *more: str) -> tuple[Config, Manifest, SampleOrder]:
    config = load("configs/demo_pretrain.yaml", [*small_run(datasets, Path("unused"))[2:], *more])
    manifest = Manifest.load(config.data.path)
    return config, manifest, SampleOrder(manifest.split("train").samples, config.train.global_batch, config.seed)


def read(datasets: Datasets, first: int, last: int, *more: str, rank: int = 0, ranks: int = 1) -> list[Batch]:
    config, manifest, order = configured(datasets, *more)
    return list(training_batches(config, manifest, order, Ranks(rank, ranks), first, last))


def same_images(a: list[Batch], b: list[Batch]) -> bool:
    first = {int(s): image for batch in a for s, image in zip(batch.samples, batch.images, strict=True)}
    return all(
        torch.equal(image, first[int(s)]) for batch in b for s, image in zip(batch.samples, batch.images, strict=True)
    )


FORMATS = ["webdataset", pytest.param("ffcv", marks=needs_ffcv)]


@pytest.mark.parametrize("file_format", FORMATS)
def test_batches_do_not_depend_on_workers_ranks_or_start(datasets: Datasets, file_format: str) -> None:
    """Pixels too: augmentation is keyed by (seed, epoch, sample)."""
    options = (f"data.format={file_format}", "data.workers_per_rank=1")
    whole = read(datasets, 4, 8, *options)  # 6 steps an epoch: the end of epoch 0, the start of epoch 1
    assert [len(batch.labels) for batch in whole] == [4] * 16
    assert same_images(whole[8:], read(datasets, 6, 8, *options))
    halves = [read(datasets, 4, 6, *options, rank=rank, ranks=2) for rank in (0, 1)]
    assert same_images(whole[:8], [*halves[0], *halves[1]])
    config, _, order = configured(datasets)
    expected = np.concatenate([ids for _, ids in order.micro_batches(4, 8, 0, 1, config.train.micro_batch)])
    assert (torch.cat([batch.samples for batch in whole]).numpy() == expected).all()
    images = torch.cat([batch.images for batch in whole])
    assert images.shape == (64, 3, 32, 32)
    assert images.dtype == torch.float32
    assert 0.3 < images.std() < 3


@needs_ffcv
def test_formats_agree(datasets: Datasets) -> None:
    """Same ids and labels in training; in evaluation nearly the same pixels (FFCV resizes by area, PIL bicubic)."""
    options = ("data.workers_per_rank=1", "data.resolution=64")
    a, b = (read(datasets, 0, 6, f"data.format={name}", *options) for name in ("webdataset", "ffcv"))
    assert all(torch.equal(x.samples, y.samples) and torch.equal(x.labels, y.labels) for x, y in zip(a, b, strict=True))
    config, manifest, _ = configured(datasets, "evaluate.resize=warp", *options)
    found = {}
    for name in ("webdataset", "ffcv"):
        tree = config.model_copy(update={"data": config.data.model_copy(update={"format": name})})
        found[name] = list(validation_batches(tree, manifest, Ranks()))
    for x, y in zip(found["webdataset"], found["ffcv"], strict=True):
        assert torch.equal(x.samples, y.samples)
        assert (x.images - y.images).abs().mean() < 0.1  # in units of the normalised image


def test_workers_give_what_the_process_itself_gives(datasets: Datasets) -> None:
    assert same_images(read(datasets, 0, 3), read(datasets, 0, 3, "data.workers_per_rank=2"))


@pytest.mark.parametrize("ranks", [1, 3, 40])
def test_every_validation_sample_once(datasets: Datasets, ranks: int) -> None:
    config, manifest, _ = configured(datasets)
    seen = [
        int(sample)
        for rank in range(ranks)
        for batch in validation_batches(config, manifest, Ranks(rank, ranks))
        for sample in batch.samples
    ]
    assert sorted(seen) == list(range(manifest.split("val").samples))


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_named(datasets: Datasets, tmp_path: Path, workers: int) -> None:
    """A damaged sample names shard and key; a truncated or missing shard is found before the first batch."""
    broken = tmp_path / "broken"
    shutil.copytree(datasets.in22k, broken)
    images = ShardImages(broken, Manifest.load(broken), "train")
    shard = broken / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    start = int(images._offsets[0])
    content[start : start + 100] = bytes(100)
    shard.write_bytes(content)
    options = (f"data.path={broken}", f"data.workers_per_rank={workers}")
    with pytest.raises(DataError, match=r"train-000000\.tar: sample 'n\w+' \(id 0\) does not decode") as caught:
        read(datasets, 0, 6, *options)
    assert "\n" not in str(caught.value)
    shard.write_bytes(content[:-5000])
    with pytest.raises(DataError, match=r"train-000000\.tar has \d+ bytes, .*says \d+"):
        read(datasets, 0, 6, *options)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar is named by .* but missing"):
        read(datasets, 0, 6, *options)


def test_ffcv_without_a_beton(datasets: Datasets, tmp_path: Path) -> None:
    config, manifest, order = configured(datasets, "data.format=ffcv")
    split = manifest.split("train").model_copy(update={"betons": []})
    bare = manifest.model_copy(update={"splits": {**manifest.splits, "train": split}})
    with pytest.raises(DataError, match=r"has no \.beton of split 'train': set data.format=webdataset"):
        training_batches(config, bare, order, Ranks(), 0, 1)
