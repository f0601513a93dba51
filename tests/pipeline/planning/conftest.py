"""Traces, which are what takes time here, are made once for all tests of the room."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.run import RunConfig
from pipeline.planning import footprint
from pipeline.planning.trace import Traced, trace

_traced: dict[Any, Traced] = {}


def traced_once(config: RunConfig, *rest: Any) -> Traced:
    """`trace`, whose result depends on the net, the loss and the other arguments alone."""
    key = (repr(config.model), repr(config.augment), repr(config.data), *rest)
    if key not in _traced:
        _traced[key] = trace(config, *rest)
    return _traced[key]


@pytest.fixture(autouse=True)
def _traces_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "trace", traced_once)
