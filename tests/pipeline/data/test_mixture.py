"""Several data sets in one run: shares, labels by WordNet id, the same samples on any number of ranks and after any
restart.
"""

import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data_prep.manifest import Manifest, ManifestError
from pipeline.config.load import Config, load
from pipeline.config.sections import ConfigError
from pipeline.data.loader import training_batches, validation_batches
from pipeline.data.mixture import MixedManifest, MixedOrder, TrainingOrder
from pipeline.data.opened import open_manifest, training_order
from pipeline.data.order import SampleOrder
from pipeline.data.views import Batch
from pipeline.ranks.collectives import Ranks
from tests.support.datasets import Datasets
from tests.support.runs import launch, log_of, small_run


def mixed(datasets: Datasets, a: float = 3, b: float = 1) -> str:
    return f"data.path=[{{path: {datasets.in22k}, weight: {a}}}, {{path: {datasets.in1k}, weight: {b}}}]"


def configured(datasets: Datasets, *more: str) -> tuple[Config, Manifest, TrainingOrder]:
    blocks = ("data.shuffle_lanes=4", "data.shuffle_window_shards=1")
    config = load("configs/demo_pretrain.yaml", [*small_run(datasets, Path("x"))[2:], mixed(datasets), *blocks, *more])
    manifest = open_manifest(config.data)
    return config, manifest, training_order(config, manifest)


def read(datasets: Datasets, first: int, last: int, *more: str, ranks: int = 1) -> list[list[Batch]]:
    config, manifest, order = configured(datasets, *more)
    return [list(training_batches(config, manifest, order, Ranks(rank, ranks), first, last)) for rank in range(ranks)]


def steps(ranks: list[list[Batch]]) -> list[list[tuple[int, int, int]]]:
    """(sample, label, view) of each global batch of 16."""
    rows = [np.stack([np.stack([b.samples, b.labels, b.views], 1) for b in batches]) for batches in ranks]
    whole = np.concatenate([part.reshape(-1, 16 // len(ranks), 3) for part in rows], axis=1)
    return [[tuple(map(int, row)) for row in step] for step in whole]


def test_shares_are_those_of_the_weights_at_every_step() -> None:
    """Of three sets, one of them tiny and rare: never off by more than two samples, and never a step back."""
    sizes = ((40, 60), (1000,), (7, 3))
    parts = tuple(SampleOrder(size, 2, 5, 2, 1) for size in sizes)
    weights = (Fraction(1, 2), Fraction(499, 1000), Fraction(1, 1000))
    order = MixedOrder(parts, weights, 16, 5)
    before = [0, 0, 0]
    for step in range(1, 400):
        taken = order.taken_before(step)
        assert sum(taken) == 16 * step
        assert all(now >= then for now, then in zip(taken, before, strict=True))
        assert all(abs(now - 16 * step * weight) <= 2 for now, weight in zip(taken, weights, strict=True))
        before = taken


def test_each_set_comes_in_its_own_epochs() -> None:
    """Between two visits of a sample lie all others of its set; views of a sample are never met twice."""
    parts = (SampleOrder((12, 20), 4, 1, 4, 1), SampleOrder((16,), 4, 1, 4, 1))
    order = MixedOrder(parts, (Fraction(1, 4), Fraction(3, 4)), 16, 1)
    drawn = [order.global_step(step) for step in range(64)]
    samples = np.concatenate([samples for samples, _ in drawn])
    views = np.concatenate([views for _, views in drawn])
    assert len(np.unique(views)) == len(views)
    first, second = samples[samples < 32], samples[samples >= 32]
    assert len(first) == 256
    assert set(Counter(first.tolist()).values()) == {8}
    assert set(Counter(second.tolist()).values()) == {48}


@pytest.mark.parametrize("how", [("augment.where=host",), ("augment.where=device", "data.workers_per_rank=2")])
def test_labels_are_joined_by_wordnet_id(datasets: Datasets, how: tuple[str, ...]) -> None:
    """Two of the seven classes are in both sets: one class each in the mixture."""
    _, manifest, order = configured(datasets)
    parts = [Manifest.load(datasets.in22k), Manifest.load(datasets.in1k)]
    assert manifest.synsets[: parts[0].num_classes] == parts[0].synsets
    assert sorted(manifest.synsets) == sorted({*parts[0].synsets, *parts[1].synsets})
    wnids: list[str] = []
    for folder, part in zip((datasets.in22k, datasets.in1k), parts, strict=True):
        for shard in part.split("train").shards:
            wnids += [part.synsets[label] for label in part.load_index(folder, shard).labels]
    found = steps(read(datasets, 0, 20, *how))
    assert isinstance(order, MixedOrder)
    for sample, label, _ in itertools.chain(*found):
        assert manifest.synsets[label] == wnids[sample]
    shares = Counter(sample < parts[0].split("train").samples for sample, _, _ in itertools.chain(*found))
    assert abs(shares[True] - 0.75 * 320) <= 2


def test_ranks_and_restarts_change_nothing(datasets: Datasets) -> None:
    whole = steps(read(datasets, 0, 16, "augment.where=device", "augment.repeats=2"))
    for first, ranks in ((3, 1), (5, 2), (11, 4)):
        assert (
            steps(read(datasets, first, 16, "augment.where=device", "augment.repeats=2", ranks=ranks)) == whole[first:]
        )


def test_validation_is_of_all_sets_together(datasets: Datasets) -> None:
    config, manifest, _ = configured(datasets)
    assert isinstance(manifest, MixedManifest)
    seen = [batch for rank in range(2) for batch in validation_batches(config, manifest, Ranks(rank, 2))]
    samples = np.concatenate([batch.samples for batch in seen])
    assert sorted(samples.tolist()) == list(range(manifest.split("val").samples))
    counts = np.bincount(np.concatenate([batch.labels for batch in seen]), minlength=manifest.num_classes)
    assert counts.tolist() == manifest.split("val").class_counts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=[{path: a, weight: 1}]", "at least 2"),
        ("data.path=[{path: a, weight: 1}, {path: b, weight: 0}]", "greater than 0"),
        ("data.path=[{path: a, weight: 1}, {path: a, weight: 2}]", "lists a set twice"),
        ("data.path=[a, b]", r"data\.path\[0\] = 'a': it has to be as {path: data/own, weight"),
        ("data.path=[{path: a, weight: .nan}, {path: b, weight: 1}]", r"data\.path\[0\]\.weight = nan: [^;]*$"),
        (
            "data.path=[{path: a, wieght: 1}, {path: b, weight: 1}]",
            r"no key 'data\.path\[0\]\.wieght'; did you mean 'data\.path\[0\]\.weight'",
        ),
        ("data.format=ffcv", "mixed by seeks into webdataset shards"),
        ("data.reader=stream", "mixed by seeks into webdataset shards"),
    ],
)
def test_what_cannot_be_mixed(datasets: Datasets, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(datasets, override)


def test_sets_that_would_count_twice_or_never(datasets: Datasets, tmp_path: Path) -> None:
    """By what they are, not by their names."""
    with pytest.raises(ManifestError, match=r"the weight 1e-09 of 1 in data\.path, less than one sample in a million"):
        configured(datasets, mixed(datasets, 1, 1e-9))
    link = tmp_path / "link"
    link.symlink_to(datasets.in22k)
    with pytest.raises(ManifestError, match=r"link in data\.path are one set"):
        configured(datasets, f"data.path=[{{path: {datasets.in22k}, weight: 1}}, {{path: {link}, weight: 1}}]")


def test_a_mixed_run_trains_and_goes_on(datasets: Datasets, tmp_path: Path) -> None:
    """By the real launcher on two ranks: with other weights it is another run; as it was, it is over."""
    arguments = small_run(datasets, tmp_path, mixed(datasets), "name=mixed", "train.epochs=2")
    done = launch(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(log_of(tmp_path, "mixed")) == 2 * (168 // 16)
    again = launch(*arguments[:2], *arguments[2:], mixed(datasets, 1, 1))
    assert again.returncode == 1
    assert "is of another configuration: data.path (dataset_id)" in again.stderr
