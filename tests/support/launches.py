"""How many operations a pass of a net dispatches, which on a GPU is how often the host has to launch something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.models.hornet import HorNet
from pipeline.ops import kernels, primitives
from tests.support.kernels import import_kernels

import_kernels()  # as all tests do: which of two ways a kernel is decorated is decided by who imports it first
from pipeline.ops.triton import block, depthwise, gnconv  # noqa: E402

# Of HorNet-L over four: orders, not widths, decide how many operations there are, and NARROW which are joined.
WIDTHS, SHARE = (48, 96, 192, 384), 4
BLOCKS = (2, 6)
STAGE = 2
_MAKE_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "promote_types", "device"}
_VIEWS = {"_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh"}


class Dispatched(TorchDispatchMode):
    """Operations by name, without views and allocations; `launch_of` counts kernels into it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in _VIEWS | _MAKE_NOTHING:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_kernels(counter: Dispatched) -> Iterator[None]:
    """The Triton kernels on, wherever tensors are, and counted in place of run: what they write is left as it was."""

    def launch(kernel: Any, *_: Any, **__: Any) -> None:
        counter.names[f"kernel {getattr(kernel, '__name__', 'of Triton')}"] += 1

    modules, narrow = (block, depthwise, gnconv), primitives.NARROW
    real = [module.launch for module in modules]
    for module in modules:
        module.launch = launch  # type: ignore[attr-defined]
    primitives.NARROW = narrow // SHARE
    try:
        with kernels.forced(True):
            yield
    finally:
        primitives.NARROW = narrow
        for module, function in zip(modules, real, strict=True):
            module.launch = function  # type: ignore[attr-defined]


def of_pass(gf: bool, policy: str, with_kernels: bool, depths: Sequence[int], batch: int = 4, px: int = 32) -> Counter:
    """Of a training pass under bf16 autocast, drop path 0.2: forward, a loss, backward."""
    torch.manual_seed(0)
    filters: dict[str, Any] = {"global_filter_stages": (2, 3), "img_size": px} if gf else {}
    model = HorNet(dims=WIDTHS, depths=depths, drop_path_rate=0.2, **filters).train()
    model.set_checkpointing(policy)  # type: ignore[arg-type]
    images, counter = torch.randn(batch, 3, px, px), Dispatched()
    run: Callable[[], Any] = lambda: model(images).float().square().mean()  # noqa: E731
    with counter, counted_kernels(counter) if with_kernels else kernels.enabled(False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = run()
        loss.backward()
    return counter.names


def of_block(gf: bool, policy: str, with_kernels: bool) -> float:
    """Of one more block in the third stage, whose draws leave some samples out."""
    few, many = (
        of_pass(gf, policy, with_kernels, [count if stage == STAGE else 1 for stage in range(4)]).total()
        for count in BLOCKS
    )
    return (many - few) / (BLOCKS[1] - BLOCKS[0])
