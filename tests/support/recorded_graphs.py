"""CUDA graphs for a CPU: operators are recorded, and replayed in order on the very tensors of the recording."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HOST_WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class RecordedGraph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, recorded in self.calls:
                found = function(*args, **kwargs)
                for place, value in zip(tree_leaves(recorded), tree_leaves(found), strict=True):
                    if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                        place.copy_(value)


class _Recording(TorchDispatchMode):
    """In place of `torch.cuda.graph`: no operator may wait for the device, whose results a capture has not."""

    def __init__(self, graph: RecordedGraph, **options: Any) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HOST_WAITS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        found = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, found))
        return found


def record_graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Have `torch.cuda.make_graphed_callables` work on a CPU; returns the graphs that will be made."""
    made: list[RecordedGraph] = []

    def graph() -> RecordedGraph:
        made.append(RecordedGraph())
        return made[-1]

    here = {"CUDAGraph": graph, "graph": _Recording, "synchronize": lambda: None}
    for name in ("Stream", "stream", "device"):
        here[name] = lambda *args: nullcontext()
    for name, stand_in in here.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    return made
