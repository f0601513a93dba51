"""Sets as streams have them: tars of unequal lengths, what is told of them, and damage to them."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.manifest import Manifest
from pipeline.config.load import Config, load
from pipeline.data.loader import training_batches
from pipeline.data.opened import training_order
from pipeline.data.order import SampleOrder
from pipeline.data.stream.manifest import load_manifest
from pipeline.data.stream.route import ShardLengths
from pipeline.data.views import Batch
from pipeline.ranks.collectives import Ranks
from tests.support.datasets import Datasets
from tests.support.runs import small_run

LENGTHS = (5, 20, 11, 14, 9, 17, 12, 8)  # 96, as the data set has


@dataclass(frozen=True)
class Tars:
    """The samples of the small data set in eight tars of `LENGTHS`, and the same tars with nothing beside them."""

    folder: Path
    classes: Path

    @property
    def urls(self) -> str:
        return f"pipe:cat {self.folder}/train-{{0..7}}.tar"

    def told(self, lengths: Sequence[int] = LENGTHS) -> Tars:
        """With an _info.json."""
        names = [f"train-{number}.tar" for number in range(len(lengths))]
        split = {"name": "train", "num_samples": sum(lengths), "filenames": names, "shard_lengths": list(lengths)}
        (self.folder / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
        return self

    def options(self, *more: str) -> list[str]:
        return ["data.reader=stream", f"data.path={self.urls}", f"data.stream_classes={self.classes}", *more]


UNCOUNTED = "data.stream_samples_per_epoch=96"


def write_tars(datasets: Datasets, folder: Path) -> Tars:
    manifest = Manifest.load(datasets.in22k)
    samples: dict[str, list[tuple[str, bytes]]] = {}
    for shard in manifest.split("train").shards:
        with tarfile.open(datasets.in22k / shard.file) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                samples.setdefault(member.name.partition(".")[0], []).append((member.name, file.read()))
    rest = list(samples.values())
    folder.mkdir()
    for number, length in enumerate(LENGTHS):
        with tarfile.open(folder / f"train-{number}.tar", "w") as tar:
            for name, data in (part for sample in rest[:length] for part in sample):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        rest = rest[length:]
    assert not rest
    classes = folder.parent / f"{folder.name}-classes.txt"
    classes.write_text("".join(f"{wnid}\n" for wnid in manifest.synsets))
    return Tars(folder, classes)


def configured(datasets: Datasets, *more: str) -> tuple[Config, Manifest, SampleOrder]:
    blocks = ("data.shuffle_lanes=4", "data.stream_shuffle_samples=7", "output_root=unused")
    config = load("configs/demo_pretrain.yaml", [*small_run(datasets, Path("unused"))[2:], *blocks, *more])
    manifest = load_manifest(config.data)
    return config, manifest, training_order(config, manifest)


def read(
    datasets: Datasets,
    *more: str,
    ranks: int = 1,
    first: int = 0,
    last: int | None = None,
    lengths: ShardLengths | None = None,
) -> list[list[Batch]]:
    """The batches of each rank for the run's steps first .. last - 1, by default to the end of the first epoch."""
    config, manifest, order = configured(datasets, *more)
    last = order.steps_per_epoch if last is None else last
    return [
        list(training_batches(config, manifest, order, Ranks(rank, ranks), first, last, lengths))
        for rank in range(ranks)
    ]


def by_step(ranks: list[list[Batch]]) -> list[tuple[tuple[int, int], ...]]:
    """(sample, label) of each global batch of 16, in its order."""
    rows = [np.stack([np.stack([b.samples, b.labels], 1) for b in batches]) for batches in ranks]
    steps = [part.reshape(-1, 16 // len(ranks), 2) for part in rows]
    whole = np.concatenate(steps, axis=1)
    return [tuple((int(sample), int(label)) for sample, label in step) for step in whole]


def counted(ranks: list[list[Batch]]) -> Counter[tuple[int, int]]:
    return Counter(pair for step in by_step(ranks) for pair in step)
