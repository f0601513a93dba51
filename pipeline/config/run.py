"""What every run's configuration has, whatever it learns: `RunConfig`. Each task adds its own sections to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from pipeline.config.fields import LocalPath, Section
from pipeline.config.sections import Checkpoint, Guard, Init, Optimizer, Tracking, Train


class RunConfig(Section):
    """One run, apart from its task's own sections: `data`, `augment`, `model`, `evaluate`."""

    name: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="folder under output_root"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    output_root: LocalPath = Path("runs")
    data: Any
    augment: Any
    model: Any
    optimizer: Optimizer
    train: Train
    evaluate: Any
    init: Init
    guard: Guard
    # Factories: an instance made here would have its section built at import (see Section).
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tracking: Tracking = Field(default_factory=Tracking)

    @property
    def run_dir(self) -> Path:
        return self.output_root / self.name

    @model_validator(mode="after")
    def _shared_relations(self) -> RunConfig:
        optimizer, train = self.optimizer, self.train
        if optimizer.warmup_epochs >= train.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs {optimizer.warmup_epochs:g} is not less than train.epochs {train.epochs}"
            )
        if train.global_batch % self.data.shuffle_lanes:
            raise ValueError(
                f"train.global_batch {train.global_batch} is not divisible by data.shuffle_lanes "
                f"{self.data.shuffle_lanes}"
            )
        if self.checkpoint.best_metric and self.evaluate.every_epochs is None:
            raise ValueError(
                f"checkpoint.best_metric {self.checkpoint.best_metric} is measured by evaluations, and "
                f"evaluate.every_epochs is null: set checkpoint.best_metric=null too"
            )
        if optimizer.lr_final > optimizer.lr_peak:
            raise ValueError(
                f"optimizer.lr_final {optimizer.lr_final:g} is above optimizer.lr_peak {optimizer.lr_peak:g}"
            )
        return self

    def flat(self) -> dict[str, Any]:
        """Every key by its dotted name, with values as JSON has them."""
        return dict(_flat(self.model_dump(mode="json")))

    def to_yaml(self) -> str:
        """The whole configuration as YAML that `load` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
