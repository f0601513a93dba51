"""What can be known to be wrong before ranks are started: configuration, files, batch, checkpoints, start weights."""

from __future__ import annotations

import sys

import torch

from data_prep.foreign import ensure_indexed
from data_prep.manifest import Manifest
from pipeline import transfer
from pipeline.checkpoint import newest_of_run
from pipeline.config import Config
from pipeline.data.beton import beton_path
from pipeline.data.decode import COMPILED
from pipeline.data.device_augment import DeviceAugment
from pipeline.data.loader import training_order
from pipeline.data.shards import ShardReader, check_remote_files
from pipeline.recipe import build_model


def note(text: str) -> None:
    """What will work, but not as well as it could."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def preflight(config: Config, ranks: int | None, resume: bool) -> None:
    """Check what a run of `config` would trip over on every rank, before any is started. Raises the same errors.

    `ranks` is their number where it is known before the launch.
    """
    ensure_indexed(config.data.path)
    manifest = Manifest.load(config.data.path)
    training_order(config, manifest)
    if config.augment.where == "device":
        DeviceAugment(config.augment)
    if ranks is not None:
        config.train.accumulation_steps(ranks)
        if ranks % config.data.shuffle_lanes and config.data.shuffle_lanes % ranks:
            note(
                f"{ranks} ranks share {config.data.shuffle_lanes} lanes (data.shuffle_lanes) unevenly: each node reads "
                f"shards of others too, up to 1.5 times its part; best is a multiple of the number of nodes"
            )
    if config.data.format == "webdataset" and not COMPILED:
        note("the compiled JPEG decoder is missing: decoding takes a third more time; see launch/setup.sh")
    for split in ("train", "val"):
        if config.data.format == "ffcv":
            beton_path(config.data.path, manifest, split)
        else:
            ShardReader(config.data, manifest, split)
    if config.data.is_remote:
        check_remote_files(config.data, manifest)
    with torch.device("meta"):
        build_model(config.model, manifest.num_classes, config.data.resolution)
    last, _ = newest_of_run(config, manifest.dataset_id, resume)
    if last is None and config.init.checkpoint is not None:
        transfer.check_model(transfer.find_source(config.init), config.model.name)
