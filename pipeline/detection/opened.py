"""What `data.path` of a detection opens, without torch: its manifest, and whether it has what is to be learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.dense_set import DenseManifest
from data_prep.manifest import ManifestError
from pipeline.config.detect import DetectConfig
from pipeline.config.sections import ConfigError
from pipeline.data.shards import DataError
from pipeline.dense.opened import open_dense

_LOOKED_INTO = 64  # samples: each shard of the training split is a uniform draw of it


def open_instances(config: DetectConfig) -> DenseManifest:
    """The manifest of an instance set. Raises ManifestError, DataError, and ConfigError where it cannot be trained on.

    Raises ConfigError for a set of boxes alone, too, where model.masks asks for masks. Single objects without a mask
    are no fault: they are left out of training.
    """
    manifest = open_dense(config, "instance")
    if not sum(manifest.split("train").class_annotations):
        raise ConfigError(f"{config.data.path} has no objects in its training images: there is nothing to learn")
    if config.evaluate.every_epochs is not None:
        every = config.evaluate.every_epochs
        _check_validation(config, manifest, f" and evaluate.every_epochs is {every}: set it to null")
    if config.model.masks and _has_boxes_alone(config.data.path, manifest):
        raise ConfigError(
            f"{config.data.path} has boxes without masks, and model.masks is true: set model.masks=false, or shard a "
            f"set whose annotations have a `segmentation`"
        )
    return manifest


def open_measured(config: DetectConfig) -> DenseManifest:
    """The manifest of an instance set whose validation images are to be evaluated on; it may have boxes alone.

    Raises ManifestError, and ConfigError where there is nothing to find.
    """
    manifest = open_dense(config, "instance")
    _check_validation(config, manifest, ": give another set with --data")
    return manifest


def _check_validation(config: DetectConfig, manifest: DenseManifest, hint: str) -> None:
    """Crowds count in no score: a set of them alone would be known as one after hours, at the first evaluation."""
    folder, objects = config.data.path, sum(manifest.split("val").class_annotations)
    try:
        found = objects and any(not each["iscrowd"] for told in _annotations(folder, manifest, "val") for each in told)
    except (DataError, ManifestError):  # the files are looked at one by one, before a run and by the doctor
        return
    if not found:
        crowds = ", crowds aside," if objects else ""
        raise ConfigError(f"{folder} has no objects{crowds} in its validation images{hint}")


def _has_boxes_alone(folder: str, manifest: DenseManifest) -> bool:
    """Whether there are objects, and none with a mask, among the first samples of the training split."""
    found = [each for told in islice(_annotations(folder, manifest, "train"), _LOOKED_INTO) for each in told]
    return bool(found) and all(each["segmentation"] is None for each in found)


def _annotations(folder: str, manifest: DenseManifest, split: str) -> Iterator[list[dict[str, Any]]]:
    """Of each sample of a split. Raises ManifestError, DataError."""
    for entry in manifest.split(split).shards:
        index, path = manifest.load_index(folder, entry), Path(folder) / entry.file
        try:
            with open(path, "rb") as file:
                for offset, size in zip(index.json_offset, index.json_bytes, strict=True):
                    file.seek(int(offset))
                    yield json.loads(file.read(int(size)))["annotations"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read: {error}; `python -m data_prep verify {folder}` lists what cannot"
            ) from None
