"""What `data.path` of a detection opens, without torch: its manifest, and whether it has what is to be learned."""

from __future__ import annotations

import json
from pathlib import Path

from data_prep.dense_set import DenseManifest
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
    if config.evaluate.every_epochs is not None and not sum(manifest.split("val").class_annotations):
        raise ConfigError(
            f"{config.data.path} has no objects in its validation images and evaluate.every_epochs is "
            f"{config.evaluate.every_epochs}: set it to null"
        )
    if config.model.masks and _has_boxes_alone(config.data.path, manifest):
        raise ConfigError(
            f"{config.data.path} has boxes without masks, and model.masks is true: set model.masks=false, or shard a "
            f"set whose annotations have a `segmentation`"
        )
    return manifest


def _has_boxes_alone(folder: str, manifest: DenseManifest) -> bool:
    """Whether there are objects, and none with a mask, among the first samples of the training split."""
    objects = masks = 0
    for entry in manifest.split("train").shards[:1]:
        index, path = manifest.load_index(folder, entry), Path(folder) / entry.file
        try:
            with open(path, "rb") as file:
                for offset, size in zip(index.json_offset[:_LOOKED_INTO], index.json_bytes, strict=False):
                    file.seek(int(offset))
                    told = json.loads(file.read(int(size)))["annotations"]
                    objects += len(told)
                    masks += sum(each["segmentation"] is not None for each in told)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read: {error}; `python -m data_prep verify {folder}` lists what cannot"
            ) from None
    return objects > 0 and masks == 0
