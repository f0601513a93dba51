"""What `data.path` of a segmentation opens, without torch: its manifest, its files, the order of training."""

from __future__ import annotations

from pathlib import Path

from data_prep.dense_set import DenseManifest
from data_prep.manifest import index_path
from pipeline.config.dense import SegmentConfig
from pipeline.config.sections import ConfigError
from pipeline.data.order import SampleOrder
from pipeline.data.shards import check_file


def open_dense(config: SegmentConfig) -> DenseManifest:
    """The manifest of a semantic set. Raises ManifestError, and ConfigError where it cannot be trained on."""
    manifest = DenseManifest.load(config.data.path)
    if manifest.task != "semantic":
        raise ConfigError(
            f"data.path {config.data.path} has {manifest.task} masks: `segment` takes a semantic set, made by "
            f"`python -m data_prep shard-dense --ade20k`"
        )
    if config.evaluate.every_epochs is not None and not ("val" in manifest.splits and manifest.split("val").samples):
        raise ConfigError(
            f"{config.data.path} has no validation images and evaluate.every_epochs is "
            f"{config.evaluate.every_epochs}: set it to null"
        )
    return manifest


def check_files(folder: str, manifest: DenseManifest, split: str) -> None:
    """Raise DataError where a shard of a split is missing, or not of the size that the manifest says."""
    for entry in manifest.split(split).shards:
        check_file(Path(folder) / entry.file, entry.bytes)
        check_file(Path(folder) / index_path(entry.file), None)


def dense_order(config: SegmentConfig, manifest: DenseManifest) -> SampleOrder:
    """The order of the training split. Raises ConfigError where it does not fill a global batch."""
    data, shards = config.data, tuple(entry.samples for entry in manifest.split("train").shards)
    try:
        return SampleOrder(
            shards, config.train.global_batch, config.seed, data.shuffle_lanes, data.shuffle_window_shards
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
