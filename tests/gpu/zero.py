"""An interrupted run is the same run on a GPU: at each ZeRO stage killed with SIGKILL and gone on with, bit for bit.

One rank, NCCL (gloo in the dry run), HorNet-T with global filters, batches augmented on the device, accumulation,
clipping, EMA, mixup, cutmix, drop path. As tests/pipeline/training/test_resume.py compares: every loss and norm as a
hexadecimal float, and all tensors of the last checkpoint. Nothing is set that a run would not set. Where two runs
differ, `first difference` tells whether before the kill: then an operation is not deterministic, and all is done once
more under torch's deterministic algorithms, which says whether the rest is right.

Of ZeRO-3 on one rank alone it is known, from a CPU (DeepSpeed 0.19.8, torch 2.15), that the first step after a resume
has a gradient norm of other last bits (1e-9 of it) where weights, states and loss are bit-equal; why is not. So stage 3
is right where the last checkpoint is the same to rounding, as for another number of ranks; it says so in its verdict.
"""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.gpu.images import make_set
from tests.gpu.timing import Bench
from tests.support.runs import ROOT

DETERMINISTIC = (
    "import torch; torch.use_deterministic_algorithms(True, warn_only=True); torch.backends.cudnn.benchmark = False; "
)
RUNNER = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
ROUNDING = 2e-3  # of a tensor's norm, as tests/pipeline/training/test_resume.py has it for other numbers of ranks
BARE = ROOT / "tests" / "gpu" / "bare"
PROGRAM = ROOT / "tests" / "support" / "programs" / "many_runs.py"
Job = dict[str, Any]


class Sizes:
    """20 steps, a checkpoint each 5, killed in the 13th; in the dry run 4, 2 and the 3rd, of two stages."""

    def __init__(self, tiny: bool) -> None:
        self.stages = (1, 3) if tiny else (0, 1, 2, 3)
        self.steps, self.every, self.kill_at = (4, 2, 3) if tiny else (20, 5, 13)
        self.model, self.px = ("hornet_nano_gf", 32) if tiny else ("hornet_tiny_gf", 96)
        self.batch, self.epochs, self.images = (4, 2, 2) if tiny else (32, 4, 40)  # images: of each of four classes


def check_stages(bench: Bench) -> bool:
    """Undisturbed runs in one process; beside it those that are killed, each in its own, twice."""
    data = make_set(bench.work / "small", Sizes(bench.tiny).images, 2, 48 if bench.tiny else 100)
    right = compare(bench, data, "as a run is")
    if not right and not bench.tiny and not bench.late("the same under deterministic algorithms", share=0.5):
        compare(bench, data, "deterministic")
    return right


def compare(bench: Bench, data: Path, how: str) -> bool:
    root, sizes = bench.work / how.replace(" ", "-"), Sizes(bench.tiny)
    root.mkdir()
    bench.heading(
        f"killed and gone on with, {how}",
        "ZeRO | steps | first difference | tensors that differ, of | furthest | verdict",
    )
    whole = [job(data, root, f"whole-{stage}", stage, sizes) for stage in sizes.stages]
    # By stage: DeepSpeed's stage 3 leaves its own F.linear behind in the process, whose last bits differ.
    killed = [job(data, root, f"killed-{stage}", stage, sizes) for stage in sizes.stages]
    with ThreadPoolExecutor(2 if bench.tiny else 1 + len(killed)) as pool:
        undisturbed = pool.submit(launch, root, whole, how)
        lanes = [pool.submit(twice, root, each, sizes.kill_at, how) for each in killed]
    right = undisturbed.result()[0] == 0
    if not right:
        bench.note(f"undisturbed runs failed: {undisturbed.result()[1][-3000:]}")
    for stage, lane in zip(sizes.stages, lanes, strict=True):
        (first_code, _), (code, _) = tries = lane.result()
        if (first_code, code) != (-9, 0):
            said = "; then ".join(f"{code}: {text[-2000:]}" for code, text in tries)
            bench.note(f"stage {stage} was to be killed (-9), and then to end well (0): {said}")
        ours, theirs = (root / f"{name}-{stage}" for name in ("killed", "whole"))
        try:
            steps, first = first_difference(ours, theirs, sizes)
            differing, tensors, furthest = different_tensors(ours, theirs, sizes.steps)
        except OSError as error:
            bench.note(f"stage {stage}: {error}")
            bench.row(zero=stage, steps=None, first=None, tensors=type(error).__name__, furthest=None, verdict="WRONG")
            right = False
            continue
        whole_way = (first_code, code) == (-9, 0) and steps == sizes.steps
        bit_equal = first is None and not differing
        rounded = stage == 3 and (first or sizes.kill_at) >= sizes.kill_at and furthest <= ROUNDING
        verdict = "WRONG" if not whole_way else "ok" if bit_equal else "ok to rounding" if rounded else "WRONG"
        right &= verdict != "WRONG"
        before = "none" if first is None else f"step {first}, {'before' if first < sizes.kill_at else 'after'} the kill"
        said = f"{differing}, {tensors}"
        bench.row(zero=stage, steps=steps, first=before, tensors=said, furthest=furthest, verdict=verdict)
    return right


def job(data: Path, root: Path, name: str, stage: int, sizes: Sizes) -> Job:
    arguments = ["pretrain", "configs/demo_pretrain.yaml", f"name={name}", f"data.path={data}", f"output_root={root}"]
    arguments += [f"train.zero_stage={stage}", f"train.epochs={sizes.epochs}", f"train.global_batch={sizes.batch}"]
    arguments += [f"train.micro_batch={sizes.batch // 2}", "optimizer.warmup_epochs=0.5", "optimizer.layer_decay=0.8"]
    arguments += [f"evaluate.every_epochs={sizes.epochs}", "evaluate.micro_batch=8", "tracking.log_every_steps=5"]
    arguments += [f"checkpoint.every_steps={sizes.every}", f"data.resolution={sizes.px}", "data.workers_per_rank=1"]
    arguments += ["augment.where=device", "augment.mixup_alpha=0.4", "augment.cutmix_alpha=0.5"]
    arguments += [f"model.name={sizes.model}", "model.drop_path_rate=0.2"]
    return {"arguments": arguments}


def twice(root: Path, job: Job, kill_at: int, how: str) -> tuple[tuple[int, str], tuple[int, str]]:
    """A run that is killed, and the same command again."""
    return launch(root, [{**job, "kill_at": kill_at}], how), launch(root, [job], how)


def launch(root: Path, jobs: list[Job], how: str) -> tuple[int, str]:
    """Exit code, and what was said."""
    first = jobs[0]["arguments"][2].removeprefix("name=")
    path = root / f"{first}-{len(jobs)}.json"
    path.write_text(json.dumps(jobs))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BARE), os.environ.get("PYTHONPATH", "")])}
    code = RUNNER
    if how == "deterministic":
        code, environment["CUBLAS_WORKSPACE_CONFIG"] = DETERMINISTIC + RUNNER, ":4096:8"
    done = subprocess.run(
        [sys.executable, "-c", code, str(PROGRAM), str(path)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def first_difference(ours: Path, theirs: Path, sizes: Sizes) -> tuple[int, int | None]:
    """How many steps were recorded, and the first, counted from 1, whose loss or norm is another; both tries count."""

    def lines(run: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / "record-0.jsonl").read_text().splitlines()]

    expected = {line["step"]: line for line in lines(theirs)}
    found = lines(ours)
    different = [line["step"] + 1 for line in found if line != expected[line["step"]]]
    return len({line["step"] for line in found}), min(different, default=None)


def different_tensors(ours: Path, theirs: Path, step: int) -> tuple[int, int, float]:
    """Of the last checkpoints: those that are not bit-equal, how many there are, and the largest difference of one to
    its norm.
    """
    differing, total, furthest = 0, 0, 0.0
    for file in ("model", "ema", "optimizer"):
        a, b = (load_file(run / "checkpoints" / f"step-{step:08d}" / f"{file}.safetensors") for run in (ours, theirs))
        total += len(b)
        if a.keys() != b.keys():
            return len(b), len(b), math.inf
        for key, value in b.items():
            differing += not torch.equal(a[key], value)
            furthest = max(furthest, float((a[key] - value).norm() / (value.norm() + 1e-7)))
    return differing, total, furthest
