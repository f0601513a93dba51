"""Reading the small data sets as runs do, what is to be expected of it, and damage to them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from data_prep.manifest import Manifest
from pipeline.config.load import Config, load
from pipeline.data.loader import training_batches
from pipeline.data.opened import training_order
from pipeline.data.order import SampleOrder
from pipeline.data.views import Batch
from pipeline.ranks.collectives import Ranks
from tests.support.datasets import Datasets
from tests.support.runs import small_run

ON_DEVICE = "augment.where=device"


def configured(datasets: Datasets, *more: str) -> tuple[Config, Manifest, SampleOrder]:
    # Lanes and windows of their own: three shards of 40, 40 and 16 samples.
    blocks = ("data.shuffle_lanes=4", "data.shuffle_window_shards=1")
    config = load("configs/demo_pretrain.yaml", [*small_run(datasets, Path("unused"))[2:], *blocks, *more])
    manifest = Manifest.load(config.data.path)
    return config, manifest, training_order(config, manifest)


def read(datasets: Datasets, first: int, last: int, *more: str, rank: int = 0, ranks: int = 1) -> list[Batch]:
    config, manifest, order = configured(datasets, *more)
    return list(training_batches(config, manifest, order, Ranks(rank, ranks), first, last))


def numbers(batches: Iterable[Batch]) -> np.ndarray:
    """(3, N): samples, labels, views."""
    return np.concatenate([torch.stack([b.samples, b.labels, b.views]).numpy() for b in batches], axis=1)


def same_images(a: list[Batch], b: list[Batch]) -> bool:
    first = {int(view): image for batch in a for view, image in zip(batch.views, batch.images, strict=True)}
    return all(
        torch.equal(image, first[int(view)])
        for batch in b
        for view, image in zip(batch.views, batch.images, strict=True)
    )


def expected(datasets: Datasets, first: int, last: int) -> np.ndarray:
    """The order itself, and labels from the shards' indexes."""
    config, manifest, order = configured(datasets)
    micros = list(order.micro_batches(first, last, 0, 1, config.train.micro_batch))
    samples = np.concatenate([micro.samples for micro in micros])
    shards = manifest.split("train").shards
    labels = np.concatenate([manifest.load_index(config.data.path, entry).labels for entry in shards])
    return np.stack([samples, labels[samples], np.concatenate([micro.views for micro in micros])])


def damage(datasets: Datasets, folder: Path, *samples: int) -> Path:
    """A copy of the set whose training `samples` (of the first shard) are zeros at their beginnings."""
    broken = folder / "broken"
    shutil.copytree(datasets.in22k, broken)
    manifest = Manifest.load(broken)
    index = manifest.load_index(broken, manifest.split("train").shards[0])
    shard = broken / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    for sample in samples:
        start = int(index.offsets[sample])
        content[start : start + 100] = bytes(100)
    shard.write_bytes(content)
    return broken
