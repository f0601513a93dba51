"""Train steps of HorNet-L: images a second, beside the published structure and ConvNeXt-L, and beside predictions.

A step is forward, cross-entropy and backward in bf16 autocast, drop path 0.2 with masks drawn anew, and no optimizer.
MFU: 3 x 2 x GMACs an image, without what is repeated, against a product of 8192^3 in bf16 measured here. `predicted`:
before any run.
"""

from typing import Any, NamedTuple

import torch

from pipeline.ops import kernels
from tests.gpu.models import POLICIES, batch_at, build, compile_blocks, gmacs, measure_step, search, set_policy
from tests.gpu.timing import Bench

DROP_PATH = 0.2
PREDICTED = {  # images/s at 384 px on an H200, before any run
    ("published", "7x7"): "233-277",
    ("published", "gf"): "160-164",
    ("plain", "7x7"): "459-555",
    ("plain", "gf"): "405-434",
    ("kernels", "7x7"): "524-709",
    ("kernels", "gf"): "619-736",
    ("ConvNeXt-L", ""): "396-450",
}


class Run(NamedTuple):
    """One row of the model tables. `policy`: None for the baselines."""

    kind: str
    what: str
    policy: str | None = None
    kernels: bool = True


def models(bench: Bench) -> bool:
    """Baselines first, then the policy that the configurations have, with kernels and without."""
    runs = [Run("", "ConvNeXt-L"), *(Run(kind, "published") for kind in bench.args.models)]
    for policy in sorted(POLICIES, key=lambda policy: policy != "selective"):
        runs += [Run(kind, "ours", policy, on) for on in (True, False) for kind in bench.args.models]
    return model_table(bench, "eager", runs, DROP_PATH, compile_them=False)


def compiled(bench: Bench) -> bool:
    """What matters most first: each costs a compiler's minutes. Of our kernels, the depthwise ones alone run there."""
    runs = [Run(kind, "ours", "selective") for kind in bench.args.models]
    runs += [Run("", "ConvNeXt-L"), *(Run(kind, "published") for kind in bench.args.models)]
    runs += [Run(kind, "ours", policy) for policy in ("none", "selective_mlp") for kind in bench.args.models]
    runs = runs[:3] if bench.tiny else runs
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
                compile_blocks(model, bench.tiny)
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
