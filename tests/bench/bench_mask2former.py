"""A step of transformers' Mask2Former with HorNet-T for its backbone, against timm's ConvNeXt-T in the same wrapper.

    python tests/bench/bench_mask2former.py [--px 256] [--batch 1] [--dtypes fp32 bf16] [--models tiny_7x7 tiny_gf]
        [--policies selective none] [--rounds 9] [--seconds 120] [--threads 1]

Forward, matching, loss and backward of one batch, gradients from None; the head is transformers' default (6 layers of
pixel decoder, 10 of decoder, 100 queries, 150 classes, 12,544 points), drop path off. Subjects take turns, forwards and
backwards. Targets: saved at most 0.75 times, time per GMAC at most 1.0 times ConvNeXt's.

- saved: MB that autograd keeps for backward, an image (batch 2 less batch 1): of the whole step, and of the backbone
  alone, since what the head keeps is the same for both.
- time per GMAC: the ratio of ms / GMAC, over rounds, with quartiles; GMACs are of the whole forward pass. The time is
  the CPU's, of all threads: with one thread it is the wall clock's on a quiet machine, and hardly more on a shared one.
- backbone: the same for the backbone alone, its maps' gradients being ones.
- --rounds 0: bytes alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import bench_model
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoBackbone, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, TimmBackboneConfig

from pipeline.models.wrapped import hornet_within

MEMORY, TIME = 0.75, 1.0


class Net(NamedTuple):
    """A model and its loss on images (B, 3, H, W)."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]


def mask2former(backbone: str, policy: str | None) -> Net:
    torch.manual_seed(0)
    config = TimmBackboneConfig(backbone=backbone, out_indices=[0, 1, 2, 3])
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=config, num_labels=150)).train()
    if policy is not None:
        hornet_within(model)[1].set_checkpointing(policy)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        masks = (torch.rand(8, *x.shape[2:]) > 0.5).float()
        classes = torch.arange(8)
        return model(pixel_values=x, mask_labels=[masks] * len(x), class_labels=[classes] * len(x)).loss

    return Net(model, loss)


def alone(backbone: str, policy: str | None) -> Net:
    """The same backbone in transformers' wrapper, without a head."""
    torch.manual_seed(0)
    model = AutoBackbone.from_config(TimmBackboneConfig(backbone=backbone, out_indices=[0, 1, 2, 3])).train()
    if policy is not None:
        hornet_within(model)[1].set_checkpointing(policy)
    return Net(model, lambda x: torch.stack([map_.float().sum() for map_ in model(x).feature_maps]).sum())


def saved(net: Net, dtype: torch.dtype | None, batch: int, px: int) -> int:
    """Bytes of the storages that autograd keeps, without parameters and images."""
    x = torch.randn(batch, 3, px, px)
    own = {t.untyped_storage()._cdata for t in (x, *net.model.parameters(), *net.model.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), bench_model.autocast(dtype):
        loss = net.loss(x)
    found = sum(storage.nbytes() for storage in kept.values())
    del loss
    return found


def gmacs(net: Net, px: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.loss(torch.randn(1, 3, px, px))
    return counter.get_total_flops() / 2e9


def saved_mb(net: Net, dtype: torch.dtype | None, px: int) -> float:
    return (saved(net, dtype, 2, px) - saved(net, dtype, 1, px)) / 1e6


def step_of(net: Net, dtype: torch.dtype | None, batch: int, px: int) -> Callable[[], None]:
    x = torch.randn(batch, 3, px, px)

    def step() -> None:
        net.model.zero_grad(set_to_none=True)
        with bench_model.autocast(dtype):
            loss = net.loss(x)
        loss.backward()

    return step


def take_turns(subjects: Sequence[bench_model.Subject], rounds: int, seconds: float) -> dict[str, list[float]]:
    """CPU seconds of each subject's steps, round by round, after one that warms up."""
    turns: dict[str, list[float]] = {each.name: [] for each in subjects}
    start = time.perf_counter()
    for number in range(-1, rounds):
        if number >= bench_model.MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for each in subjects if number % 2 else reversed(subjects):
            before = time.process_time()
            each.step()
            if number >= 0:
                turns[each.name].append(time.process_time() - before)
    return turns


def judged(value: float, target: float | None) -> str:
    return f"{value:.2f}" if target is None else f"{value:.2f} {'<=' if value <= target else '> '} {target}"


def case(build: Callable[[str, str | None], Net], label: str, dtype_name: str, args: argparse.Namespace) -> None:
    """Print the rows of one table: ConvNeXt-T first, then HorNet-T by model and policy."""
    dtype = bench_model.DTYPES[dtype_name]
    names = {"ConvNeXt-T": ("convnext_tiny", None)}
    names |= {f"HorNet {m}, {p}": (f"hornet_{m}", p) for m in args.models for p in args.policies}
    nets: dict[str, bench_model.Subject] = {}
    for name, (backbone, policy) in names.items():
        net = build(backbone, policy)
        step = step_of(net, dtype, args.batch, args.px)
        nets[name] = bench_model.Subject(name, step, gmacs(net, args.px), saved_mb(net, dtype, args.px))
        del net, step
    turns = take_turns(list(nets.values()), args.rounds, args.seconds) if args.rounds else {}
    base = nets["ConvNeXt-T"]
    for name, net in nets.items():
        assert net.saved_mb is not None
        assert base.saved_mb is not None
        ours = name != base.name
        cells = [label, dtype_name, name, f"{net.gmacs:.1f}", f"{net.saved_mb:.0f}"]
        cells.append(judged(net.saved_mb / base.saved_mb, MEMORY if ours else None))
        if turns:
            middle, low, high = bench_model.ratio(turns[name], turns[base.name])  # of its time to the base's
            per_gmac = base.gmacs / net.gmacs
            cells.append(f"{statistics.median(turns[name]) / args.batch * 1e3:.0f}")
            cells.append(
                f"{judged(middle * per_gmac, TIME if ours else None)} ({low * per_gmac:.2f}-{high * per_gmac:.2f})"
            )
            cells.append(str(len(turns[name])))
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", choices=list(bench_model.DTYPES), default=list(bench_model.DTYPES))
    parser.add_argument("--models", nargs="+", default=["tiny_7x7", "tiny_gf"])
    parser.add_argument("--policies", nargs="+", default=["selective"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=120, help="of a table at most, after three rounds")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.rounds:
        bench_model.keep_freed_memory()
    print("| | dtype | backbone | GMACs | saved MB | to ConvNeXt's | CPU ms/image | per GMAC to ConvNeXt's | rounds |")
    print("|" + "---|" * 9)
    for dtype_name in args.dtypes:
        case(mask2former, "Mask2Former", dtype_name, args)
        case(alone, "backbone", dtype_name, args)


if __name__ == "__main__":
    main()
