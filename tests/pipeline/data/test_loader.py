"""Readers: every way of reading gives the same samples in the same batches, augmentation is keyed, damage is named."""

import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.augment import seed_view, training_transform
from pipeline.data.keyed import view_keys
from pipeline.data.loader import training_batches, validation_batches
from pipeline.data.shards import DataError, ShardReader
from pipeline.ranks.collectives import Ranks
from tests.support.datasets import Datasets, needs_ffcv
from tests.support.loading import ON_DEVICE, configured, damage, expected, numbers, read, same_images


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_ranks_and_workers_read_the_order(datasets: Datasets, ranks: int, workers: int, where: str) -> None:
    """Two epochs (of 6 steps) from the start, and from a step inside the first: ids, labels and views by position."""
    for first in (0, 5):
        options = (f"data.workers_per_rank={workers}", f"augment.where={where}")
        parts = [read(datasets, first, 12, *options, rank=rank, ranks=ranks) for rank in range(ranks)]
        by_rank = [numbers(part).reshape(3, 12 - first, -1) for part in parts]
        assert (np.concatenate(by_rank, axis=2).reshape(3, -1) == expected(datasets, first, 12)).all()


@needs_ffcv
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ffcv_reads_the_order(datasets: Datasets, ranks: int) -> None:
    """As above, from a `.beton`; both of FFCV's caches."""
    options = ("data.format=ffcv", "data.workers_per_rank=2", ON_DEVICE)
    found = []
    for rank in range(ranks):
        cache = ("os", "process")[rank % 2]
        batches = read(datasets, 5, 12, *options, f"data.ffcv_cache={cache}", rank=rank, ranks=ranks)
        found.append(numbers(batches).reshape(3, 7, -1))
        assert {batch.images.dtype for batch in batches} == {torch.uint8}
    assert (np.concatenate(found, axis=2).reshape(3, -1) == expected(datasets, 5, 12)).all()


@pytest.mark.parametrize(
    "options",
    [
        ("augment.where=host",),
        (ON_DEVICE,),
        pytest.param(("data.format=ffcv", "augment.where=host"), marks=needs_ffcv),
    ],
    ids=["host", "device", "ffcv"],
)
def test_pixels_do_not_depend_on_workers_ranks_or_start(datasets: Datasets, options: tuple[str, ...]) -> None:
    whole = read(datasets, 4, 8, *options, "data.workers_per_rank=1")  # the end of epoch 0, the start of epoch 1
    assert [len(batch.labels) for batch in whole] == [4] * 16
    halves = [read(datasets, 4, 6, *options, rank=rank, ranks=2) for rank in (0, 1)]
    assert same_images(whole[:8], [*halves[0], *halves[1]])
    if "ffcv" not in options[0]:
        assert same_images(whole[8:], read(datasets, 6, 8, *options, "data.workers_per_rank=2"))
    images = torch.cat([batch.images for batch in whole])
    assert images.shape == (64, 3, 32, 32)
    if options[-1] == ON_DEVICE:
        assert images.dtype == torch.uint8
        assert 20 < images.float().std() < 120
    else:
        assert images.dtype == torch.float32
        assert 0.3 < images.std() < 3


@needs_ffcv
def test_formats_draw_the_same_crops(datasets: Datasets) -> None:
    """Same crop, same flip: nearly the same pixels (FFCV resizes by area). In evaluation too."""
    options = ("data.workers_per_rank=1", "data.resolution=64", ON_DEVICE)
    a, b = (read(datasets, 0, 6, f"data.format={name}", *options) for name in ("webdataset", "ffcv"))
    assert (numbers(a) == numbers(b)).all()
    pairs = [(x.images.float(), y.images.float()) for x, y in zip(a, b, strict=True)]
    difference = torch.cat([(x - y).abs().flatten(1).mean(1) for x, y in pairs])
    assert difference.max() < 12  # of 255; a mirrored or shifted crop of these noisy drawings is at 25 and more
    for resize in ("warp", "crop"):
        config, manifest, _ = configured(datasets, f"evaluate.resize={resize}", *options)
        found = {}
        for name in ("webdataset", "ffcv"):
            tree = config.model_copy(update={"data": config.data.model_copy(update={"format": name})})
            found[name] = list(validation_batches(tree, manifest, Ranks()))
        assert (numbers(found["webdataset"]) == numbers(found["ffcv"])).all()
        for x, y in zip(found["webdataset"], found["ffcv"], strict=True):
            assert (x.images.float() - y.images.float()).abs().mean() < 5  # of 255


def test_host_augmentation_is_timms_to_the_last_bit(datasets: Datasets) -> None:
    """Only the crop is decoded; the result is that of timm's transform on the whole image."""
    more = ("augment.crop_area_min=0.08", "augment.rand_augment=rand-m9-mstd0.5-inc1", "augment.random_erasing=0.25")
    config, manifest, _ = configured(datasets, *more)
    crop, rest = training_transform(config.augment, 32)
    reader = ShardReader(config.data, manifest, "train")
    for batch in read(datasets, 0, 6, *more):
        for sample, view, image in zip(batch.samples, batch.views, batch.images, strict=True):
            with Image.open(BytesIO(reader.encoded(int(sample)))) as whole:
                seed_view(int(view_keys(config.seed, view.numpy())))
                assert torch.equal(rest(crop(whole.convert("RGB"))), image)


@pytest.mark.parametrize("where", ["host", "device"])
def test_repeats_and_progressive_resolution(datasets: Datasets, where: str) -> None:
    more = (
        f"augment.where={where}",
        "augment.repeats=2",
        "data.resolution=64",
        "data.resolution_by_epoch={0: 32, 1: 64}",
    )
    batches = read(datasets, 4, 8, *more)
    assert [batch.images.shape[-1] for batch in batches] == [32] * 8 + [64] * 8
    for batch in batches:
        assert (batch.samples[::2] == batch.samples[1::2]).all()
        assert not torch.equal(batch.images[0], batch.images[1])


@pytest.mark.parametrize("ranks", [1, 3, 40])
def test_every_validation_sample_once(datasets: Datasets, ranks: int) -> None:
    """28 samples, on more ranks than there are samples too: some ranks then have none."""
    config, manifest, _ = configured(datasets)
    seen = [
        int(sample)
        for rank in range(ranks)
        for batch in validation_batches(config, manifest, Ranks(rank, ranks))
        for sample in batch.samples
    ]
    assert sorted(seen) == list(range(manifest.split("val").samples))


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_named(datasets: Datasets, tmp_path: Path, workers: int, where: str) -> None:
    """A damaged sample names shard and key; a truncated or missing shard is found before the first batch."""
    broken = damage(datasets, tmp_path, 0)
    options = (f"data.path={broken}", f"data.workers_per_rank={workers}", f"augment.where={where}")
    with pytest.raises(DataError, match=r"train-000000\.tar: sample 'n\w+' \(id 0\) does not decode") as caught:
        read(datasets, 0, 6, *options)
    assert "\n" not in str(caught.value)
    shard = broken / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"train-000000\.tar has \d+ bytes, .*says \d+"):
        read(datasets, 0, 6, *options)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar is named by .* but missing"):
        read(datasets, 0, 6, *options)
    (broken / "train-000001.index.npz").unlink()
    shutil.copy(datasets.in22k / "train-000000.tar", shard)
    with pytest.raises(DataError, match=r"train-000001\.index\.npz is named by .* but missing"):
        read(datasets, 0, 6, *options)


@pytest.mark.parametrize("where", ["host", "device"])
def test_bad_samples_are_stood_in_for(datasets: Datasets, tmp_path: Path, where: str) -> None:
    """The same stand-ins for any number of ranks and from any start; all other places are as they were."""
    options = (f"data.path={damage(datasets, tmp_path, 0, 3)}", "data.on_bad_sample=skip", f"augment.where={where}")
    whole = read(datasets, 0, 6, *options)
    bad = {sample.sample: sample for batch in whole for sample in batch.bad}
    assert set(bad) == {0, 3}
    assert "train-000000.tar: sample 'n" in bad[0].error
    found, wanted = numbers(whole), expected(datasets, 0, 6)
    for sample, ledger in bad.items():
        assert ledger.stand_in not in (0, 3)
        assert found[0, wanted[0] == sample] == [ledger.stand_in]
    untouched = ~np.isin(wanted[0], [0, 3])
    assert (found[:, untouched] == wanted[:, untouched]).all()
    second = [read(datasets, 2, 6, *options, rank=rank, ranks=2) for rank in (0, 1)]
    assert same_images(whole, [*second[0], *second[1]])
    all_bad = damage(datasets, tmp_path / "all", *range(40))
    for shard in ("train-000001.tar", "train-000002.tar"):
        content = (all_bad / shard).read_bytes()
        (all_bad / shard).write_bytes(bytes(len(content)))
    with pytest.raises(DataError, match="and the 8 drawn to stand in for it do not decode"):
        read(datasets, 0, 6, f"data.path={all_bad}", *options[1:])


def test_ffcv_without_a_beton(datasets: Datasets) -> None:
    config, manifest, order = configured(datasets, "data.format=ffcv")
    split = manifest.split("train").model_copy(update={"betons": []})
    bare = manifest.model_copy(update={"splits": {**manifest.splits, "train": split}})
    with pytest.raises(DataError, match=r"has no \.beton of split 'train': set data.format=webdataset"):
        training_batches(config, bare, order, Ranks(), 0, 1)
