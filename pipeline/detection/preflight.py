"""What can be known to be wrong with a detection before ranks are started; without torch where that can be."""

from __future__ import annotations

import importlib

from pipeline.config.detect import SET_PREDICTORS, DetectConfig
from pipeline.dense.preflight import check_run
from pipeline.detection.opened import open_instances


def preflight(config: DetectConfig, ranks: int | None, nodes: int, resume: bool) -> None:
    """Check what a run of `config` would trip over on every rank, before any is started. Raises the same errors.

    `ranks` is their number, where it is known before the launch, on `nodes` hosts.
    """
    check_run(config, open_instances, ranks, resume)
    if config.model.head in SET_PREDICTORS:  # transformers alone can say whether it can be built; it imports torch
        classes, torch = open_instances(config).num_classes, importlib.import_module("torch")
        with torch.device("meta"):
            build = importlib.import_module("pipeline.detection.detector").build_detector
            build(config.model, classes, config.data.resolution)
