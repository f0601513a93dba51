"""A configuration of whatever task: which one, its key `task` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.dense import SegmentConfig
from pipeline.config.detect import DetectConfig
from pipeline.config.load import Config, load
from pipeline.config.run import RunConfig

_KINDS: dict[str | None, type[RunConfig]] = {None: Config, "segment": SegmentConfig, "detect": DetectConfig}


def validated(tree: Mapping[str, Any]) -> RunConfig:
    """What `model_dump` has made, as a configuration again."""
    return _KINDS[tree.get("task")].model_validate(tree)


def load_any(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """`load` of whichever task the file is of. Raises ConfigError."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        tree = None  # which `load` explains
    task = tree.get("task") if isinstance(tree, dict) else None
    return load(path, overrides, _KINDS.get(task, Config) if isinstance(task, str | None) else Config)
