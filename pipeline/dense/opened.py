"""What `data.path` of segmentations and detections opens, without torch: manifest, files, the order of training."""

from __future__ import annotations

from pathlib import Path

from data_prep.dense_set import DenseManifest, Task
from data_prep.manifest import index_path
from pipeline.config.run import RunConfig
from pipeline.config.sections import ConfigError
from pipeline.data.order import SampleOrder
from pipeline.data.shards import check_file

_TAKES = {"semantic": ("segment", "masks of classes", "--ade20k"), "instance": ("detect", "objects", "--coco")}


def open_dense(config: RunConfig, task: Task = "semantic") -> DenseManifest:
    """The manifest of a set of the task. Raises ManifestError, and ConfigError where it cannot be trained on."""
    manifest = DenseManifest.load(config.data.path)
    if manifest.task != task:
        command, what, option = _TAKES[task]
        raise ConfigError(
            f"data.path {config.data.path} has {_TAKES[manifest.task][1]}: `{command}` takes a set with {what}, made "
            f"by `python -m data_prep shard-dense {option}`"
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


def dense_order(config: RunConfig, manifest: DenseManifest) -> SampleOrder:
    """The order of the training split. Raises ConfigError where it does not fill a global batch."""
    data, shards = config.data, tuple(entry.samples for entry in manifest.split("train").shards)
    try:
        return SampleOrder(
            shards, config.train.global_batch, config.seed, data.shuffle_lanes, data.shuffle_window_shards
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
