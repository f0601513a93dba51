"""What can be known to be wrong with a segmentation, or a detection, before ranks are started; without torch where that
can be.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from data_prep.dense_set import DenseManifest
from data_prep.storage import Folder, refuse_unwritable
from pipeline.checkpoints.choice import check_model, find_source, newest_of_run
from pipeline.config.dense import MASK2FORMER, SegmentConfig
from pipeline.config.run import RunConfig
from pipeline.dense.by_transformers import check_transformers
from pipeline.dense.opened import check_files, dense_order, open_dense
from pipeline.records.address import probe
from pipeline.training.initial import fetch, local_init
from pipeline.training.preflight import note, tell_of_unfinished


def preflight(config: SegmentConfig, ranks: int | None, nodes: int, resume: bool) -> None:
    """Check what a run of `config` would trip over on every rank, before any is started. Raises the same errors.

    `ranks` is their number, where it is known before the launch, on `nodes` hosts.
    """
    if config.model.head == MASK2FORMER:
        check_transformers(config.model.head)
    check_run(config, open_dense, ranks, resume)


def check_run(config: RunConfig, open_set: Callable[[Any], DenseManifest], ranks: int | None, resume: bool) -> None:
    """`preflight` of a run on the set that `open_set` opens for its configuration."""
    refuse_unwritable(Folder(config.run_dir), "set another output_root")
    manifest = open_set(config)
    dense_order(config, manifest)
    if ranks is not None:
        config.train.accumulation_steps(ranks)
    for split in ("train", "val") if config.evaluate.every_epochs is not None else ("train",):
        check_files(config.data.path, manifest, split)
    last, _ = newest_of_run(config, manifest.dataset_id, resume, hashes=False)
    if last is None and config.init.checkpoint is not None:
        fetch(config)
        source = find_source(local_init(config))
        check_model(source, config.model.name)
        tell_of_unfinished(config.init.checkpoint)
        if not source.is_ours:
            plain = dataclasses.replace(source, synsets=None, by_size=False)
            importlib.import_module("pipeline.checkpoints.transfer").check_fit(config, plain, [])
    probe(config, note)
