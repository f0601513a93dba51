"""Train step and inference of HorNet on a CPU, against the published structure and against timm's ConvNeXt.

    python tests/bench/bench_model.py [--models t-7x7 t-gf l-7x7] [--px 224 384] [--dtypes fp32 bf16] [--batch 4]
        [--rounds 15] [--seconds 20] [--policies none selective] [--threads 2] [--compiled] [--no-blocks] [--quick]

t-7x7 and t-gf are HorNet-T; l-7x7 is a slice of L, its widths with depths 1/1/2/1. Subjects are the published structure
(published.py, with our weights), ours, and timm's ConvNeXt of about the same GMACs: convnext_tiny for T, ConvNeXt-L's
widths with depths 1/2/3/1 for the slice. A case's subjects take turns, forwards and backwards, until `--rounds` or
`--seconds` are over (three rounds at least), so that a disturbance hits all of them. `ratio` is the median over rounds
of published / subject, with its quartiles; GMAC/s are images/s times GMACs, which lets unequal models be compared.

- train: forward, cross-entropy, backward, gradients from None; drop path 0.2 in all. The masks are drawn anew in every
  round and are not the same for all: ours skips what is dropped, so its times are those of an average over many masks.
- infer: eval and inference_mode; "fused" after `fuse_for_inference(model)`.
- Freed memory stays with the process, and two rounds warm up: with the C library's defaults, large tensors go back to
  the system and their pages come anew, which made single steps of the published structure and of ConvNeXt, hardly
  of ours, up to 1.6 times as long. `faults` are what is left of it, thousands of pages a step.
- saved: MB that autograd keeps for backward, per image (batch 2 less batch 1), drop path off.
- blocks: one block of every stage of T and L, train step without drop path: no map size may be slower than published.
- --compiled: minutes of a C++ compiler more. `model.compile_blocks()` for ours, torch.compile(model) for the others.

bf16 is autocast. About a quarter of an hour on two quiet cores.
"""

import argparse
import copy
import ctypes
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import bench_activations
import timm
import torch
import torch.nn.functional as F
from published import DEPTHS, GF_STAGES, ORDERS, STRIDES, PublishedBlock, PublishedHorNet, widths
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.fuse import fuse_for_inference
from pipeline.models.hornet import HorNet
from pipeline.ops.fourier import fourier_basis

DROP_PATH = 0.2
MIN_ROUNDS = 3
WARM_UP_ROUNDS = 2
BATCH_384 = 0.5  # of the batch at 224, whose maps are a third as large


class Spec(NamedTuple):
    first_width: int
    depths: tuple[int, ...]
    gf: bool
    convnext_depths: tuple[int, ...]
    convnext_width: int


SPECS = {
    "t-7x7": Spec(64, DEPTHS, False, (3, 3, 9, 3), 96),
    "t-gf": Spec(64, DEPTHS, True, (3, 3, 9, 3), 96),
    "l-7x7": Spec(192, (1, 1, 2, 1), False, (1, 2, 3, 1), 192),
    "l-gf": Spec(192, (1, 1, 2, 1), True, (1, 2, 3, 1), 192),
}
# Train step with drop path at 224 px: at least this many times as fast as the published structure.
TARGETS = {("t-7x7", "fp32"): 1.25, ("t-gf", "fp32"): 1.35, ("t-gf", "bf16"): 1.6}
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class Subject(NamedTuple):
    name: str
    step: Callable[[], object]
    gmacs: float
    saved_mb: float | None = None


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def keep_freed_memory() -> None:
    """Tell the C library to give no memory back to the system; what is not glibc does as it does."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no tensor is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


class Turns(NamedTuple):
    """Of one subject, one entry a round."""

    seconds: list[float]
    faults: list[int]


def take_turns(subjects: Sequence[Subject], rounds: int, seconds: float) -> dict[str, Turns]:
    """Time and page faults of each subject's steps."""
    turns = {subject.name: Turns([], []) for subject in subjects}
    start = time.perf_counter()
    for number in range(-WARM_UP_ROUNDS, rounds):
        if number == 0:
            start = time.perf_counter()
        if number >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for subject in subjects if number % 2 else reversed(subjects):
            faults, before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            subject.step()
            if number >= 0:
                turns[subject.name].seconds.append(time.perf_counter() - before)
                turns[subject.name].faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
    return turns


def ratio(baseline: Sequence[float], subject: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile) of how many times as fast as the baseline, round by round."""
    ratios = sorted(a / b for a, b in zip(baseline, subject, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), low, high


def hornets(spec: Spec, px: int, drop_path: float) -> tuple[PublishedHorNet, HorNet]:
    """The published structure and ours, of the same weights."""
    dims = widths(spec.first_width)
    filters = {"global_filter_stages": GF_STAGES, "img_size": px} if spec.gf else {}
    ours = HorNet(dims=dims, depths=spec.depths, drop_path_rate=drop_path, **filters)
    published = PublishedHorNet(dims, spec.depths, gf=spec.gf, img_size=px, drop_path_rate=drop_path)
    published.load_state_dict(ours.state_dict(), strict=True)
    return published, ours


def convnext(spec: Spec, drop_path: float) -> nn.Module:
    return timm.models.ConvNeXt(depths=spec.convnext_depths, dims=widths(spec.convnext_width), drop_path_rate=drop_path)


def gmacs(model: nn.Module, px: int) -> float:
    """Of one image's forward pass: convolutions and matrix products; transforms of GF by FFT are not counted."""
    model = copy.deepcopy(model).eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, px, px, device="meta"))
    return counter.get_total_flops() / 2e9


def saved_mb(model: nn.Module, dtype: torch.dtype | None, px: int) -> float:
    one, two = (bench_activations.trace_forward(model, "cpu", dtype, batch, px).saved for batch in (1, 2))
    return (two - one) / 1e6


def train_step(model: nn.Module, x: Tensor, labels: Tensor, dtype: torch.dtype | None) -> Callable[[], object]:
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(dtype):
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()

    return step


def infer_step(model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> Callable[[], object]:
    model.eval()

    def step() -> None:
        with torch.inference_mode(), autocast(dtype):
            model(x)

    return step


def compiled(model: nn.Module) -> nn.Module:
    """Ours by its own method, where it has it."""
    model = copy.deepcopy(model)
    if hasattr(model, "compile_blocks"):
        model.compile_blocks()
        return model
    return torch.compile(model, dynamic=False)


def subjects(
    name: str, px: int, dtype: torch.dtype | None, mode: str, batch: int, args: argparse.Namespace
) -> list[Subject]:
    """What takes turns in one case; the published structure comes first."""
    spec = SPECS[name]
    torch.manual_seed(0)
    x, labels = torch.randn(batch, 3, px, px), torch.randint(0, 1000, (batch,))
    train = mode == "train"

    def subject(label: str, model: nn.Module, count: float, saved: float | None = None) -> Subject:
        step = train_step(model, x, labels, dtype) if train else infer_step(model, x, dtype)
        return Subject(label, step, count, saved)

    published, ours = hornets(spec, px, DROP_PATH if train else 0.0)
    peer = convnext(spec, DROP_PATH if train else 0.0)
    count, peer_count = gmacs(published, px), gmacs(peer, px)
    if not train:
        out = [subject("published", published, count), subject("ours", ours, count)]
        out.append(subject("ours, fused", fuse_for_inference(copy.deepcopy(ours).eval()), count))
    else:
        plain = hornets(spec, px, 0.0)
        out = [subject("published", published, count, saved_mb(plain[0], dtype, px))]
        for policy in args.policies:
            with_policy = copy.deepcopy(ours)
            if bench_activations.set_policy(with_policy, policy):
                bench_activations.set_policy(plain[1], policy)
                out.append(subject(f"ours, {policy}", with_policy, count, saved_mb(plain[1], dtype, px)))
    out.append(subject("ConvNeXt", peer, peer_count, saved_mb(convnext(spec, 0.0), dtype, px) if train else None))
    if args.compiled:
        models = {"published": published, "ours": ours, "ConvNeXt": peer}
        for label, model in models.items():
            out.append(subject(f"{label}, compiled", compiled(model), peer_count if label == "ConvNeXt" else count))
    return out


def bench_models(args: argparse.Namespace) -> dict[tuple[str, int, str], float]:
    """Print the table of whole models; returns ratios of ours (the first policy) in the training cases."""
    columns = "model | px | dtype | case | subject | ms/image | images/s | GMAC/s | ratio (quartiles) | faults | saved"
    print(f"| {columns} |\n|{'---|' * 11}")
    found: dict[tuple[str, int, str], float] = {}
    for name in args.models:
        for px in args.px:
            batch = args.batch if px < 384 else max(1, int(args.batch * BATCH_384))
            for dtype_name in args.dtypes:
                for mode in args.modes:
                    case = subjects(name, px, DTYPES[dtype_name], mode, batch, args)
                    seconds = args.seconds if mode == "train" else args.seconds / 2
                    turns = take_turns(case, args.rounds, seconds)
                    for subject in case:
                        middle, low, high = ratio(turns["published"].seconds, turns[subject.name].seconds)
                        per_image = statistics.median(turns[subject.name].seconds) / batch
                        saved = "" if subject.saved_mb is None else f"{subject.saved_mb:.1f}"
                        print(
                            f"| {name} | {px} | {dtype_name} | {mode} | {subject.name} | {per_image * 1e3:.1f} "
                            f"| {1 / per_image:.2f} | {subject.gmacs / per_image:.0f} "
                            f"| {middle:.2f} ({low:.2f}-{high:.2f}) "
                            f"| {statistics.median(turns[subject.name].faults) / 1000:.0f} | {saved} |",
                            flush=True,
                        )
                        if mode == "train" and subject.name.startswith("ours"):
                            found.setdefault((name, px, dtype_name), middle)
    return found


def block_pair(
    width: int, stage: int, gf: bool, px: int, dtype: torch.dtype | None, batch: int, saving: str
) -> list[Subject]:
    """One block of the published structure and of ours at `stage`, of the same weights, as train steps."""
    side, dim = px // STRIDES[stage], widths(width)[stage]
    filters = {"global_filter_stages": GF_STAGES, "img_size": px} if gf else {}
    (ours,) = HorNet(dims=widths(width), depths=(1, 1, 1, 1), **filters).stages[stage]
    published = PublishedBlock(dim, ORDERS[stage], (side, side // 2 + 1) if gf else None, 0.0, 1e-6)
    published.load_state_dict(ours.state_dict(), strict=True)
    # The streams are those of the whole models: ours carries autocast's dtype, the published one is promoted to fp32.
    x = torch.randn(batch, dim, side, side)
    own_x = x.permute(0, 2, 3, 1).contiguous().to(dtype or torch.float32)
    basis = fourier_basis(side, side, own_x.dtype, own_x.device) if gf else None

    dout, own_dout = torch.randn_like(x), torch.randn_like(own_x)

    def published_step() -> None:
        with autocast(dtype):
            y = published(x)
        y.backward(dout)

    def own_step() -> None:
        ours(own_x, basis=basis, saving=saving).backward(own_dout)

    def cleared(model: nn.Module, given: Tensor, work: Callable[[], None]) -> Callable[[], None]:
        given.requires_grad_()

        def step() -> None:
            model.zero_grad(set_to_none=True)
            given.grad = None
            work()

        return step

    return [
        Subject("published", cleared(published, x, published_step), 0.0),
        Subject("ours", cleared(ours, own_x, own_step), 0.0),
    ]


def bench_blocks(args: argparse.Namespace) -> list[str]:
    """Print the table of single blocks; returns those that are slower than the published structure."""
    saving = args.policies[0] if args.policies[0] in ("selective", "selective_mlp") else "none"
    print("\n| block | px | map | dtype | published ms | ours ms | ratio (quartiles) |\n|---|---|---|---|---|---|---|")
    slower = []
    for letter, width in (("T", 64), ("L", 192)):
        for px in args.px:
            batch = max(1, args.batch // (1 if px < 384 else 2))
            for dtype_name in args.dtypes:
                for stage in range(4):
                    for gf in (False, True) if stage in GF_STAGES else (False,):
                        pair = block_pair(width, stage, gf, px, DTYPES[dtype_name], batch, saving)
                        turns = take_turns(pair, args.rounds, args.seconds / 10)
                        middle, low, high = ratio(turns["published"].seconds, turns["ours"].seconds)
                        side = px // STRIDES[stage]
                        what = f"{letter} stage {stage + 1}{' gf' if gf else ''} | {px} | {side}x{side}"
                        published, ours = (statistics.median(turns[key].seconds) * 1e3 for key in ("published", "ours"))
                        print(
                            f"| {what}x{widths(width)[stage]} | {dtype_name} | {published:.1f} | {ours:.1f} "
                            f"| {middle:.2f} ({low:.2f}-{high:.2f}) |",
                            flush=True,
                        )
                        if middle < 1:
                            slower.append(f"{what.replace(' |', ',')}, {dtype_name}: {middle:.2f}")
    return slower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SPECS), default=["t-7x7", "t-gf", "l-7x7"])
    parser.add_argument("--px", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=("train", "infer"), default=["train", "infer"])
    parser.add_argument("--policies", nargs="+", default=["none"], help="memory policies of ours; the first is judged")
    parser.add_argument("--batch", type=int, default=4, help="at 224 px; half of it at 384")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, default=20, help="of one training case; inference half, a block a tenth"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--no-blocks", dest="blocks", action="store_false")
    parser.add_argument("--quick", action="store_true", help="224 px, batch 2, few rounds")
    args = parser.parse_args()
    if args.quick:
        args.px, args.batch, args.rounds, args.seconds = [224], 2, 5, 5.0
    if args.compiled and not shutil.which("g++"):
        print("no g++: torch.compile has no compiler on this CPU, compiled rows are left out")
        args.compiled = False
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(f"torch {torch.__version__}, {args.threads} threads, batch {args.batch} at 224 px, drop path {DROP_PATH}\n")
    start = time.perf_counter()
    found = bench_models(args)
    slower = bench_blocks(args) if args.blocks else None
    print("\n| target: train step at 224 px | wanted | found | |\n|---|---|---|---|" if found or args.blocks else "")
    for (name, dtype_name), wanted in TARGETS.items():
        if (value := found.get((name, 224, dtype_name))) is not None:
            met = "met" if value >= wanted else "NOT met"
            print(f"| {name}, {dtype_name} | {wanted:.2f} | {value:.2f} | {met} |")
    if slower is not None:
        print(
            f"| no map size slower than published | 1.00 | {'; '.join(slower) or 'none'} | {'NOT ' * bool(slower)}met |"
        )
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
