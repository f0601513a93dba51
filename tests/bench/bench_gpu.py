"""HorNet-L on one GPU: the Triton kernels are right, what each reaches, and images per second, beside predictions.

    python3 tests/bench/bench_gpu.py --output gpu.jsonl [--parts correct depthwise kernels models compiled batch]
        [--models 7x7 gf] [--px 384 224] [--batch 64] [--seconds 500] [--dry-run]

Needs a CUDA device and torch, triton and timm; nothing is installed. Rows are printed as Markdown and written as JSON
lines as they come, so that what ends early leaves what it has. `--seconds` bounds each part: rows that do not fit are
named and left out. Each part runs alone. CUDA events, medians after warming up; nothing else may use the device. Its
other files: gpu_timing.py, gpu_kernels.py, gpu_checks.py, gpu_models.py, published.py.

- correct: each kernel against float64 on the device, at awkward shapes; then a slice of L, values and gradients, with
  kernels and without, for each memory policy. Exit 1 if one is wrong. All else is worth reading only after this.
- depthwise: 7x7 in bf16 at L's four stages, forward and both gradients: cuDNN in channels_last and NCHW (benchmark
  mode, contiguous inputs), and ours (a slice of a wider map, as in the model). FMA bound: that of fp32 multiply-adds.
- kernels: each other kernel at L's shapes: GB/s against a copy of the device, and against what runs without it.
- models: train step (forward, cross-entropy, backward; no optimizer; drop path 0.2, masks drawn anew) at bf16 autocast:
  published structure, ours by memory policy with kernels and without, timm's convnext_large. MFU: 3 x 2 x GMACs an
  image, without what is repeated, against a product of 8192^3 in bf16 measured here. `predicted`: before any run.
- compiled: the same by torch.compile of each block (`compile_blocks`; depthwise kernels stay ours), drop path off.
- batch: the largest micro-batch, in eights, with room for AdamW's states; drop path off, the worst case.

`--dry-run`: the flow of it on the CPU with tiny sizes, kernels in Triton's interpreter; its numbers mean nothing.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package need not be installed
if "--dry-run" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which torch and timm may do

import gpu_kernels
import torch
import torch.nn.functional as F
from gpu_checks import check_kernels, check_model, exact_fp32
from gpu_kernels import TOTALS, WIDTHS, Case, convolution_backward
from gpu_models import POLICIES, build, compile_blocks, gmacs, measure_step, search, set_policy
from gpu_timing import Bench
from torch import Tensor

from pipeline.ops import kernels

DROP_PATH = 0.2
FMA_TFLOPS = {"H200": 66.9, "H100": 66.9, "A100": 19.5}  # fp32 outside tensor cores, data sheets
PREDICTED = {  # images/s at 384 px on an H200, before any run
    ("published", "7x7"): "233-277",
    ("published", "gf"): "160-164",
    ("plain", "7x7"): "459-555",
    ("plain", "gf"): "405-434",
    ("kernels", "7x7"): "524-709",
    ("kernels", "gf"): "619-736",
    ("ConvNeXt-L", ""): "396-450",
}


def correct(bench: Bench) -> bool:
    with exact_fp32():
        return all([check_kernels(bench), check_model(bench)])


def depthwise(bench: Bench) -> bool:
    copy = bench.copy_bytes_s()
    columns = "px | map | pass | spelling | us | TFLOP/s | of FMA bound | GB/s | of copy"
    bench.heading(f"depthwise 7x7, bf16; copy {copy / 1e12:.2f} TB/s", columns)
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else ""
    bound = next((tflops for key, tflops in FMA_TFLOPS.items() if key in name), None)
    like = torch.empty(0, device=bench.device, dtype=torch.bfloat16)
    for px in bench.args.px:
        for stage, channels in enumerate((12, 24) if bench.tiny else TOTALS):
            side = (8 if bench.tiny else px // 4) >> stage
            batch = 1 if bench.tiny else batch_at(bench, px)
            cases = [("Triton", case) for case in gpu_kernels.depthwise_cases(batch, side, channels, like)]
            for spelling, case in (*stock_depthwise(batch, side, channels, like), *cases):
                what = case.name.removeprefix("depthwise").removeprefix("_") or "forward"
                fields = {"px": px, "map": f"{batch}x{side}x{side}x{channels}", "what": what, "spelling": spelling}
                if bench.late(f"{fields}"):
                    continue
                took = bench.attempt(case.run)
                if isinstance(took, str):
                    bench.row(**fields, us=took)
                    continue
                tflops, speed = case.flops / took / 1e12, case.bytes / took
                measured = {"us": took * 1e6, "tflops": tflops, "of_fma": bound and tflops / bound}
                bench.row(**fields, **measured, gb_s=speed / 1e9, of_copy=speed / copy)
    return True


def stock_depthwise(batch: int, side: int, channels: int, like: Tensor) -> Iterator[tuple[str, Case]]:
    """torch's convolution, forward and both gradients, in both layouts."""
    weight = torch.randn(channels, 1, 7, 7, device=like.device).to(like.dtype)
    bias = torch.randn(channels, device=like.device).to(like.dtype)
    for spelling, layout in (("cuDNN NHWC", torch.channels_last), ("cuDNN NCHW", torch.contiguous_format)):
        maps = (torch.randn(batch, channels, side, side, device=like.device).to(like.dtype) for _ in range(2))
        x, dy = (t.to(memory_format=layout) for t in maps)
        w = weight.to(memory_format=layout)
        flops, moved = 2 * 49 * x.numel(), gpu_kernels.size(x, dy)
        works: dict[str, Callable[[], object]] = {
            "forward": lambda x=x, w=w: F.conv2d(x, w, bias, padding=3, groups=channels),
            "backward_input": lambda x=x, w=w, dy=dy: convolution_backward(dy, x, w, [True, False, False]),
            "backward_weight": lambda x=x, w=w, dy=dy: convolution_backward(dy, x, w, [False, True, True]),
        }
        for what, work in works.items():
            yield spelling, Case(what, "", work, tuple, None, moved, flops)


def other_kernels(bench: Bench) -> bool:
    copy = bench.copy_bytes_s()
    columns = "kernel | shape | us | GB/s | of copy | without it, us | ratio"
    bench.heading(f"other kernels, bf16; copy {copy / 1e12:.2f} TB/s", columns)
    like = torch.empty(0, device=bench.device, dtype=torch.bfloat16)
    px = bench.args.px[0]
    batch = 1 if bench.tiny else batch_at(bench, px)
    for stage, channels in enumerate((12, 24) if bench.tiny else WIDTHS):
        side = (4 if bench.tiny else px // 4) >> stage
        rows = batch * side * side
        hidden = gpu_kernels.row_cases(rows, 4 * channels, like)
        cases = (
            *(case for case in gpu_kernels.row_cases(rows, channels, like) if "gelu" not in case.name),
            *(case for case in hidden if "gelu" in case.name),
            *gpu_kernels.residual_cases(batch, side * side, channels, like),
            *gpu_kernels.gated_linear_cases(rows, channels // 2, channels, like),
        )
        for case in cases:
            if bench.late(f"{case.name} {case.shape}"):
                continue
            fields = {"kernel": case.name, "shape": case.shape}
            took = bench.attempt(case.run)
            if isinstance(took, str):
                bench.row(**fields, us=took)
                continue
            without: float | str | None = None
            if case.plain is not None:
                with kernels.enabled(False):
                    without = bench.attempt(case.plain)
            speed = case.bytes / took
            ratio = without / took if isinstance(without, float) else None
            said = without * 1e6 if isinstance(without, float) else without
            measured = {"us": took * 1e6, "gb_s": speed / 1e9, "of_copy": speed / copy}
            bench.row(**fields, **measured, without_us=said, ratio=ratio)
    return True


class Run(NamedTuple):
    """One row of the model tables. `policy`: None for the baselines."""

    kind: str
    what: str
    policy: str | None = None
    kernels: bool = True


def models(bench: Bench) -> bool:
    """Baselines first; ours with kernels and without."""
    runs = [Run("", "ConvNeXt-L")]
    for kind in bench.args.models:
        runs.append(Run(kind, "published"))
        runs += [Run(kind, "ours", policy, on) for policy in POLICIES for on in (True, False)]
    return model_table(bench, "eager", runs, DROP_PATH, compile_them=False)


def compiled(bench: Bench) -> bool:
    """What matters most first: each costs a compiler's minutes. Of our kernels, the depthwise ones alone run there."""
    runs = [Run(kind, "ours", policy) for kind in bench.args.models for policy in ("none", "selective")]
    runs += [*(Run(kind, "published") for kind in bench.args.models), Run("", "ConvNeXt-L")]
    runs += [Run(kind, "ours", policy) for kind in bench.args.models for policy in ("selective_mlp", "block")]
    return model_table(bench, "compiled by block, drop path off", runs, 0.0, compile_them=True)


def model_table(bench: Bench, how: str, runs: list[Run], drop_path: float, compile_them: bool) -> bool:
    peak_flops = bench.gemm_flops_s()
    columns = "px | model | what | batch | images/s | predicted | to published | GMAC/s | to ConvNeXt-L | MFU | peak GB"
    title = f"HorNet-L, train step, bf16, {how}; product of 8192^3 {peak_flops / 1e12:.0f} TFLOP/s"
    bench.heading(title, columns)
    for px in bench.args.px:
        batch = 2 if bench.tiny else batch_at(bench, px)
        baselines: dict[tuple[str, str], float] = {}  # images/s of the published structure, GMAC/s of ConvNeXt-L
        for run in runs:
            if bench.late(f"{px} {run}"):
                continue
            torch.manual_seed(0)
            torch._dynamo.reset()  # else every model's code counts against one limit
            model = build(bench.device, bench.tiny, run.kind, run.what, px, drop_path)
            if run.policy is not None and not set_policy(model, run.policy):
                continue
            if compile_them:
                compile_blocks(model)
            with kernels.enabled(run.kernels):
                measured = measure_step(bench, model, batch, px)
            del model
            bench.clear()
            spelling = "" if compile_them else ", kernels" if run.kernels else ", plain"
            what = run.what if run.policy is None else f"ours, {run.policy}{spelling}"
            fields: dict[str, Any] = {"px": px, "model": run.kind, "what": what, "batch": batch}
            if isinstance(measured, str):
                bench.row(**fields, images_s=measured)
                continue
            per_s, peak_bytes = measured
            rate = per_s * gmacs(bench.tiny, run.kind, run.what, px)
            if run.policy is None:
                baselines[(run.what, run.kind)] = rate if run.what == "ConvNeXt-L" else per_s
            published, peer = baselines.get(("published", run.kind)), baselines.get(("ConvNeXt-L", ""))
            spelled = run.what if run.policy is None else "kernels" if run.kernels else "plain"
            known = px == 384 and not compile_them and run.policy in (None, "none", "selective")
            bench.row(
                **fields,
                images_s=per_s,
                predicted=PREDICTED.get((spelled, run.kind)) if known else None,
                to_published=published and per_s / published,
                gmac_s=rate,
                to_convnext=peer and rate / peer,
                mfu=6e9 * rate / peak_flops,
                peak_gb=peak_bytes / 1e9,
            )
    return True


def largest_batch(bench: Bench) -> bool:
    columns = "px | model | what | micro-batch | peak GB | images/s"
    bench.heading("largest micro-batch, bf16, drop path off", columns)
    for px in bench.args.px:
        for kind in bench.args.models:
            for what, policy in (("published", None), *(("ours", policy) for policy in POLICIES)):
                if bench.late(f"{px} {kind} {what} {policy}"):
                    continue
                model = build(bench.device, bench.tiny, kind, what, px, 0.0)
                if policy is not None and not set_policy(model, policy):
                    continue
                batch, per_s, peak = search(bench, model, px) or (0, None, 0)
                del model
                bench.clear()
                label = what if policy is None else f"ours, {policy}"
                bench.row(px=px, model=kind, what=label, batch=batch, peak_gb=peak / 1e9, images_s=per_s)
    return True


def batch_at(bench: Bench, px: int) -> int:
    """As many pixels at every size as `--batch` has at 384."""
    return max(1, round(bench.args.batch * (384 / px) ** 2 / 8) * 8)


RUN: dict[str, Callable[[Bench], bool]] = {
    "correct": correct,
    "depthwise": depthwise,
    "kernels": other_kernels,
    "models": models,
    "compiled": compiled,
    "batch": largest_batch,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(RUN), default=list(RUN))
    parser.add_argument("--models", nargs="+", choices=("7x7", "gf"), default=["7x7", "gf"])
    parser.add_argument("--px", type=int, nargs="+", default=[384, 224])
    parser.add_argument("--batch", type=int, default=64, help="images at 384 px; as many pixels at other sizes")
    parser.add_argument("--seconds", type=float, default=500, help="of a part")
    parser.add_argument("--output", help="JSON lines are appended here")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        args.px = [64]
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        print("no CUDA device: nothing measured (--dry-run runs the flow of it on the CPU)")
        return 0
    bench = Bench(args)
    name = "CPU, dry run" if args.dry_run else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, batch {args.batch} at 384 px")
    bench.write(device=name, torch=torch.__version__, arguments=vars(args))
    right = True
    for part in args.parts:
        bench.begin(part)
        right &= RUN[part](bench)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
