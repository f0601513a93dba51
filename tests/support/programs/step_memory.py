"""A rank of real training steps that counts bytes: of its tensors, its resident memory, and what it sends.

    torchrun ... tests/support/programs/step_memory.py CONFIG RESULT [key=value ...] [-- key=value ...]

Settings, between which stands --, take turns. Rank 0 writes to RESULT a list in JSON, a dictionary each:
`held`, bytes of all tensors between two steps; `peak`, the most at any moment of a step; `optimizer`, of AdamW's states
and EMA; `resident`, the peak resident memory of the process in a step above that before the model was built; `sent`,
bytes of the tensors given to each collective within one step.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config.load import Config, load
from pipeline.models.build import build_model
from pipeline.ranks.collectives import Ranks
from pipeline.training import engine
from pipeline.training.recipe import mixing_and_loss, optimizer, parameter_groups

CLASSES = 50
COLLECTIVES = ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "all_gather")


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive, and their peak since `mark`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes or storage.device.type == "meta":
            return
        self._sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._free, storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def alive() -> LiveBytes:
    """All tensors of this process, counted."""
    live = LiveBytes()
    everything = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    everything += [t.grad for t in everything if t.is_leaf and t.grad is not None]
    for tensor in everything:
        live.add(tensor)
    return live


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def count_sent(sent: Counter[str]) -> None:
    """Have torch.distributed's collectives count the bytes that they are given."""

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            sent[name] += max((t.nbytes for t in tensors), default=0)
            return function(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name)))


def measure(config: Config, ranks: Ranks, device: torch.device, sent: Counter[str]) -> dict[str, Any]:
    """The bytes of one setting."""
    gc.collect()
    left = alive().now  # of the setting before this one: DeepSpeed's engines do not go with their last name
    side, batch = config.data.resolution, config.train.micro_batch
    images, labels = torch.randn(batch, 3, side, side), torch.arange(batch) % CLASSES
    _, loss = mixing_and_loss(config.augment, CLASSES)
    targets = labels
    if config.augment.mixup_alpha or config.augment.cutmix_alpha:
        targets = torch.nn.functional.one_hot(labels, CLASSES).float()
    before = resident("VmRSS")
    torch.manual_seed(0)
    model = build_model(config.model, CLASSES, side)
    subject = engine.Engine(config, model, optimizer(parameter_groups(model, config.optimizer), config), ranks, device)
    batches = [(images, targets)] * config.train.accumulation_steps(ranks.count)
    subject.train_step(iter(batches), loss)
    gc.collect()
    forget_peak()
    subject.train_step(iter(batches), loss)
    above = resident("VmHWM") - before
    live = alive()
    sent.clear()
    held = live.now - left
    with live:
        subject.train_step(iter(batches), loss)
    states = [s for state in subject._inner.state.values() for s in state.values()]
    return {
        "held": held,
        "peak": live.peak - left,
        "optimizer": sum(s.nbytes for s in states),
        "resident": above,
        "sent": dict(sent),
        "parameters": subject.parameters,
    }


def main(config_path: str, result: str, *arguments: str) -> None:
    sent: Counter[str] = Counter()
    count_sent(sent)  # first: DeepSpeed keeps some of the functions that it finds
    ranks, device = engine.start_ranks()
    gc.collect()
    gc.freeze()  # what imports have made is not searched again, each time for half a second
    found = []
    for overrides in " ".join(arguments).split(" -- "):
        found.append(measure(load(Path(config_path), overrides.split()), ranks, device, sent))
    if ranks.rank == 0:
        Path(result).write_text(json.dumps(found))
    engine.stop_ranks()


if __name__ == "__main__":
    main(*sys.argv[1:])
