"""Traces, which are what takes time here, are made once for all tests of the room."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.load import Config
from pipeline.planning import footprint
from pipeline.planning.trace import Traced, trace

_traced: dict[Any, Traced] = {}


def traced_once(config: Config, *rest: Any) -> Traced:
    """`trace`, whose result depends on the net, the loss and the other arguments alone."""
    augment = config.augment
    loss = "soft" if augment.mixup_alpha or augment.cutmix_alpha else augment.label_smoothing
    key = (config.model.name, loss, *rest)
    if key not in _traced:
        _traced[key] = trace(config, *rest)
    return _traced[key]


@pytest.fixture(autouse=True)
def _traces_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "trace", traced_once)
