"""Bytes that HorNet keeps for backward per image, and the matrix products that each memory policy repeats. No device.

    python tests/bench/bench_activations.py [--models 7x7 gf] [--px 224 384] [--dtypes bf16 fp32] [--policies ...]
        [--dims 192] [--depths 2 3 18 2] [--no-backward] [--list N] [--quick]

Everything runs on fake tensors, which have shapes, types and storages but no values: HorNet-L takes seconds a row on
one core (three to four minutes in all), and the counts are those of the real thing. Drop path is off, the worst case.
Markdown on the standard output, for pipeline/README.md and RESULTS.md.

- saved: storages that autograd saves in forward, each once and whole, as `saved_tensors_hooks` sees them: batch 2 less
  batch 1, so that parameters, their casts and whatever else does not grow with the batch is left out, to the byte. The
  input image, the loader's, is left out too. The fake device is CUDA, because its autocast casts other operators than
  the CPU's does (`pow` of a LayerNorm by hand to fp32); no GPU is needed. What cannot run there is marked *: CPU.
- alive: storages made in forward that still live at its end; the same number, unless something is kept past autograd
- peak: most bytes alive at once from then to the end of backward, per image; gradients of activations included, those
  of parameters amortised over a large batch. On the fake CPU.
- repeated: FLOPs of matrix products and convolutions in forward and backward above those of `none`. On the fake CPU.

Kernels are off; with them, `none` keeps what `selective` does. Baselines are the published structure (published.py) in
fp32 and under AMP, the published recipe.
"""

import argparse
import contextlib
import os
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ["PIPELINE_KERNELS"] = "0"  # what has no values must not reach a kernel; read when pipeline.ops is imported

import torch
from published import DEPTHS, GF_STAGES, PublishedHorNet, widths
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from pipeline.models.hornet import HorNet

# A hidden layer costs the same product in every stage, and its bytes halve from one to the next: keeping the last
# stage's, 3.5 MB an image, leaves out a twelfth of the products that selective_mlp repeats.
MIXED = "selective_mlp,selective_mlp,selective_mlp,selective"
POLICIES = ("none", "selective", "selective_mlp", MIXED, "block", "stage")
LARGE_BATCH = 4096  # the gradients of 195 M parameters are then 0.2 MB an image
MB = 1e6

# At 384 px under bf16: at most this share of what the published structure saves under AMP, and this share of repeated
# FLOPs; per (7x7, gf).
TARGETS: dict[str, tuple[tuple[float, float], float]] = {
    "selective": ((0.45, 0.28), 0.0),
    MIXED: ((0.31, 0.19), 0.11),
    "block": ((0.06, 0.04), 1.0),
}


def convolution_backward_flops(grad_out: Any, x: Any, weight: Any, *rest: Any, out_val: Any = None) -> int:
    """Each gradient costs what the convolution costs; torch's own count takes a grouped convolution for a dense one.

    Arguments are those of aten.convolution_backward.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, output_mask = rest
    return conv_flop_count(x.shape, weight.shape, grad_out.shape, transposed=transposed) * sum(output_mask[:2])


FLOPS: dict[Any, Any] = {**flop_registry, torch.ops.aten.convolution_backward: convolution_backward_flops}


class Trace(TorchDispatchMode):
    """Bytes of the storages that operations made and that are alive, their maximum, and the FLOPs so far.

    Not FlopCounterMode: its hooks keep activations alive that the model lets go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._bytes: dict[int, int] = {}  # by address of the storage's implementation, unique while it lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._bytes or storage._cdata in given:
                continue
            self._bytes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int) -> None:
        self.now -= self._bytes.pop(key)


class Forward(NamedTuple):
    saved: int  # bytes
    alive: int  # bytes
    tensors: Counter[tuple[tuple[int, ...], torch.dtype]]  # bytes by shape of the first tensor seen, and type


@contextlib.contextmanager
def autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast`, also for a CUDA device that exists in name only."""
    torch.set_autocast_enabled(device, dtype is not None)
    torch.set_autocast_dtype(device, dtype or torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, False)


def trace_forward(model: nn.Module, device: str, dtype: torch.dtype | None, batch: int, px: int) -> Forward:
    """What one forward pass leaves behind. The model and the pass are fake tensors on `device`."""
    x = torch.empty(batch, 3, px, px, device=device)
    own = {t.untyped_storage()._cdata for t in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}  # the storages too: an address that is freed would come again
    tensors: Counter[tuple[tuple[int, ...], torch.dtype]] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage
            tensors[(tuple(tensor.shape), tensor.dtype)] += storage.nbytes()
        return tensor

    with Trace() as trace, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with autocast(device, dtype):
            out = model(x)
        alive = trace.now - out.untyped_storage().nbytes()
    saved = sum(storage.nbytes() for storage in kept.values())
    return Forward(saved, alive, tensors)


def trace_backward(model: nn.Module, dtype: torch.dtype | None, batch: int, px: int) -> tuple[int, int]:
    """(peak bytes from the end of forward to the end of backward, FLOPs of both), on the fake CPU."""
    x = torch.empty(batch, 3, px, px)
    with Trace() as trace:
        with autocast("cpu", dtype):
            loss = model(x).sum()
        trace.peak = trace.now
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return trace.peak, trace.flops


def build(kind: str, published: bool, px: int, device: str, args: argparse.Namespace) -> nn.Module:
    dims, depths, gf = widths(args.dims), tuple(args.depths), kind == "gf"
    with torch.device("meta"):  # where initial values, which a fake tensor cannot hold, are passed over
        if published:
            model: nn.Module = PublishedHorNet(dims, depths, gf=gf, img_size=px)
        else:
            model = HorNet(
                dims=dims, depths=depths, **({"global_filter_stages": GF_STAGES, "img_size": px} if gf else {})
            )
    for module in model.modules():  # what `to_empty` does, which fake tensors refuse
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    return model


def set_policy(model: nn.Module, policy: str) -> bool:
    """Whether the model has this policy; if so, it is set."""
    if hasattr(model, "set_checkpointing"):
        model.set_checkpointing(policy.split(",") if "," in policy else policy)
        return True
    if policy in ("none", "block"):
        model.set_grad_checkpointing(policy == "block")
        return True
    return False


class Row(NamedTuple):
    saved: float  # MB an image
    alive: float
    peak: float | None
    flops: float | None  # of one image, forward and backward
    device: str  # where the forward pass was traced
    tensors: Counter[tuple[tuple[int, ...], torch.dtype]]


def measure(kind: str, policy: str | None, px: int, dtype: torch.dtype | None, args: argparse.Namespace) -> Row | None:
    """One row; `policy` None is the published structure. None where the model does not have the policy."""
    for device in ("cuda", "cpu"):
        model = build(kind, policy is None, px, device, args)
        if policy is not None and not set_policy(model, policy):
            return None
        try:
            one, two = (trace_forward(model, device, dtype, batch, px) for batch in (1, 2))
            break
        except (RuntimeError, AssertionError) as error:  # torch.cuda asked for a device
            if device == "cpu":
                raise
            if args.verbose:
                print(f"<!-- {kind} {policy}: not on a fake CUDA device: {error!r} -->")
    peak = flops = None
    if args.backward:
        model = build(kind, policy is None, px, "cpu", args)
        if policy is not None:
            set_policy(model, policy)
        peak_bytes, total = trace_backward(model, dtype, LARGE_BATCH, px)
        peak, flops = peak_bytes / LARGE_BATCH / MB, total / LARGE_BATCH
    return Row((two.saved - one.saved) / MB, (two.alive - one.alive) / MB, peak, flops, device, one.tensors)


def table(kind: str, px: int, args: argparse.Namespace) -> list[str]:
    """Print one table; returns the rows of verdicts against the targets, where they are for this size."""
    name = {64: "T", 96: "S", 128: "B", 192: "L"}.get(args.dims, f"{args.dims}")
    img = "" if kind == "7x7" else f", filters for {px}"
    print(f"\nHorNet-{name} {kind} at {px} px{img}, depths {'/'.join(map(str, args.depths))}\n")
    print("| what | dtype | saved MB/image | of published AMP | alive MB | peak MB | repeated FLOPs |")
    print("|---|---|---|---|---|---|---|")
    amp = measure(kind, None, px, torch.bfloat16, args)
    assert amp is not None
    verdicts = []
    for dtype_name in args.dtypes:
        dtype = torch.bfloat16 if dtype_name == "bf16" else None
        baseline = amp if dtype else measure(kind, None, px, None, args)
        rows = {"published": baseline, **{policy: measure(kind, policy, px, dtype, args) for policy in args.policies}}
        none = rows.get("none")
        for what, row in rows.items():
            if row is None:
                continue
            repeated = None
            if row.flops is not None and none is not None and none.flops is not None and what != "published":
                repeated = row.flops / none.flops - 1
            share = row.saved / amp.saved
            label = (what if what == "published" else f"ours, {what}") + "*" * (row.device == "cpu")
            print(
                f"| {label} | {dtype_name} | {row.saved:.1f} | {share:.3f} | {row.alive:.1f} "
                f"| {'' if row.peak is None else f'{row.peak:.1f}'} "
                f"| {'' if repeated is None else f'{100 * repeated:.1f} %'} |",
                flush=True,
            )
            if what in TARGETS and dtype and (px, args.dims, tuple(args.depths)) == (384, 192, DEPTHS):
                verdicts.append(verdict(kind, what, share, repeated))
            if args.list:
                print(
                    "\n".join(
                        f"<!-- {n / MB:8.1f} MB {shape} {t} -->" for (shape, t), n in row.tensors.most_common(args.list)
                    )
                )
    return verdicts


def verdict(kind: str, policy: str, share: float, repeated: float | None) -> str:
    shares, allowed = TARGETS[policy]
    wanted = shares[kind == "gf"]
    met = share <= wanted and (repeated is None or repeated <= allowed)
    found = f"{share:.3f}" + ("" if repeated is None else f", {100 * repeated:.1f} % repeated")
    return f"| {kind}, {policy} | {wanted:.2f}, {100 * allowed:.0f} % | {found} | {'met' if met else 'NOT met'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("7x7", "gf"), default=["7x7", "gf"])
    parser.add_argument("--px", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--dims", type=int, default=192, help="width of the first stage: 64, 96, 128, 192 for T to L")
    parser.add_argument("--depths", type=int, nargs=4, default=list(DEPTHS))
    parser.add_argument("--no-backward", dest="backward", action="store_false", help="leave out peak and FLOPs")
    parser.add_argument("--list", type=int, default=0, metavar="N", help="also the N largest groups of saved tensors")
    parser.add_argument("--quick", action="store_true", help="384 px in bf16 alone")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.px, args.dtypes = [384], ["bf16"]
    torch.set_num_threads(1)
    start = time.perf_counter()
    with FakeTensorMode():
        verdicts = [verdict for kind in args.models for px in args.px for verdict in table(kind, px, args)]
    if verdicts:
        print("\n| target at 384 px, bf16 | wanted | found | |\n|---|---|---|---|")
        print("\n".join(verdicts))
    print(f"\n{time.perf_counter() - start:.0f} s, torch {torch.__version__}")


if __name__ == "__main__":
    main()
