"""What a train step keeps for backward and takes at its peak, by memory policy, beside what was predicted.

kept: memory at the end of forward less that before it, a larger batch less a smaller, so that what does not grow with
the batch is left out. predicted: tests/bench/bench_activations.py, on fake tensors; there without kernels, with which
`none` keeps what `selective` does. peak: forward and backward of `--batch` images, weights and gradients in it.
"""

import re
import subprocess
import sys

import torch
import torch.nn.functional as F

from pipeline.ops import kernels
from tests.bench.published import DEPTHS
from tests.gpu.models import POLICIES, autocast, batch_at, build, measure_step, set_policy
from tests.gpu.timing import Bench
from tests.support.runs import ROOT

_ROW = re.compile(r"\| (?:ours, )?(\w+)\*? \| bf16 \| ([\d.]+) \|")


def by_policy(bench: Bench) -> bool:
    px = bench.args.px[0]
    foreseen = {kind: start_prediction(bench, kind, px) for kind in bench.args.models}
    rows = []
    subjects = [("published", None, False), *(("ours", policy, on) for policy in POLICIES for on in (True, False))]
    for kind in bench.args.models:
        for what, policy, on in subjects:
            label = what if policy is None else f"{policy}, {'kernels' if on else 'plain'}"
            if bench.late(f"{px} {kind} {label}", share=0.7):
                continue
            model = build(bench.device, bench.tiny, kind, what, px, 0.0)
            if policy is not None:
                set_policy(model, policy)
            with kernels.enabled(on):
                kept = kept_bytes(bench, model, px)
                measured = measure_step(bench, model, 2 if bench.tiny else batch_at(bench, px), px, quick=True)
            del model
            bench.clear()
            rows.append((kind, label, policy or what, kept, measured))
    columns = "px | model | what | predicted MB an image | kept MB an image | peak GB"
    bench.heading("memory, bf16, drop path off", columns)
    predicted = {kind: read_prediction(bench, process) for kind, process in foreseen.items()}
    for kind, label, policy, kept, measured in rows:
        peak = measured if isinstance(measured, str) else measured[1] / 1e9
        bench.row(px=px, model=kind, what=label, predicted=predicted[kind].get(policy), kept=kept / 1e6, peak_gb=peak)
    return True


def kept_bytes(bench: Bench, model: torch.nn.Module, px: int) -> float:
    """An image's, after a first pass that allocates what stays. 0 on a CPU, which does not tell."""
    if bench.tiny:
        return 0.0
    found = []
    small = 8
    for batch in (small, small, 2 * small):
        x = torch.randn(batch, 3, px, px, device=bench.device)
        labels = torch.zeros(batch, dtype=torch.long, device=bench.device)
        bench.clear()
        before = torch.cuda.memory_allocated()
        with autocast(bench.device, torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), labels)
        found.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        model.zero_grad(set_to_none=True)
        del loss
    return (found[2] - found[1]) / small


def start_prediction(bench: Bench, kind: str, px: int) -> subprocess.Popen:
    """In a process of its own, beside what is measured: it turns the kernels off, and has a core for itself."""
    command = [sys.executable, "tests/bench/bench_activations.py", "--no-backward", "--models", kind, "--px", str(px)]
    command += ["--dtypes", "bf16", "--policies", *POLICIES]
    command += ["--dims", "16", "--depths", "1", "1", "2", "1"] if bench.tiny else ["--depths", *map(str, DEPTHS)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_prediction(bench: Bench, process: subprocess.Popen) -> dict[str, float]:
    """MB an image by policy, as far as it came in time."""
    try:
        table, said = process.communicate(timeout=max(1.0, bench.left))
    except subprocess.TimeoutExpired:
        process.kill()
        table, said = process.communicate()
        bench.note("left out for lack of time: a part of the prediction")
    if process.returncode > 0:
        bench.note(f"no prediction: {said[-1000:]}")
    return {row[1]: float(row[2]) for row in map(_ROW.match, table.splitlines()) if row}
