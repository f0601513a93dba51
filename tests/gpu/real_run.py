"""The real thing: launch/deepspeed.sh pretrains HorNet-L at 384 px on shards made here, and its own log says how fast.

Beside it the bare step's images a second (steps.py): what is between them is the loader, augmentation on the device,
mixing, AdamW, clipping, the guard's reads and logging. The first epoch is left out: kernels are compiled in it.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from pipeline.config.sections import Model
from pipeline.review.log import Log, read_log
from tests.gpu.images import make_set
from tests.gpu.models import build, measure_step, set_policy
from tests.gpu.steps import DROP_PATH
from tests.gpu.timing import Bench
from tests.support.runs import ROOT

CONFIG = "configs/pretrain_hornet_l_in22k_384.yaml"
GRAPHS = "cuda_graphs"


def measure_run(bench: Bench) -> bool:
    bench.heading("launch/deepspeed.sh pretrain, HorNet-L 7x7, ZeRO-1, bf16, augmentation on the device", COLUMNS)
    log = pretrain(bench, "run")
    bare = bare_images_per_second(bench)
    report(bench, "as configured", log, bare)
    return log is not None


def measure_graphs(bench: Bench) -> bool:
    """The same with CUDA graphs, where the configuration has them."""
    if GRAPHS not in Model.model_fields:
        bench.note(f"model.{GRAPHS} is no key of this version's configuration: nothing to measure")
        return True
    bench.heading("the same with CUDA graphs", COLUMNS)
    log = pretrain(bench, "graphs", f"model.{GRAPHS}=true")
    before = read_log(bench.work / "runs" / "run" / "log.jsonl")
    report(bench, "CUDA graphs", log, before.median("images_per_second"))
    return log is not None


COLUMNS = "what | images/s | beside it | share of that | data wait | checkpoint stall, s | memory GB | MFU | steps"


def report(bench: Bench, what: str, log: Log | None, beside: float | None) -> None:
    if log is None:
        return
    speed = steady(log, "images_per_second")
    bench.row(
        what=what,
        images_s=speed,
        beside=beside,
        share=speed / beside if speed and beside else None,
        data_wait=steady(log, "data_wait"),
        checkpoint_stall=log.largest("checkpoint_stall"),
        memory_gb=log.largest("memory_gb"),
        mfu=steady(log, "mfu"),
        steps=int(log.steps.max()) if len(log.steps) else 0,
    )


def steady(log: Log, key: str) -> float | None:
    """The median of a metric after the first epoch."""
    column, epochs = log.columns.get(key), log.columns.get("epoch")
    if column is None or epochs is None:
        return None
    later = set(epochs.rows[epochs.values > 1.0].tolist())
    values = [value for row, value in zip(column.rows.tolist(), column.values.tolist(), strict=True) if row in later]
    return float(np.median(values)) if values else None


def pretrain(bench: Bench, name: str, *more: str) -> Log | None:
    """Of 64 images a step on one rank; None where it failed or was not done in time."""
    tiny = bench.tiny
    data = make_set(bench.work / "photographs", *((4, 2, 120) if tiny else (224, 16, 500)))
    batch, epochs = (8, 3) if tiny else (64, 8)
    steps = epochs * (16 if tiny else 896) // batch
    arguments = [f"name={name}", f"data.path={data}", f"output_root={bench.work / 'runs'}", f"train.epochs={epochs}"]
    arguments += [f"train.global_batch={batch}", f"train.micro_batch={batch}", f"evaluate.every_epochs={epochs}"]
    # So small a batch at the recipe's rate would have steps left out.
    arguments += ["optimizer.lr_peak=1e-4", "optimizer.warmup_epochs=1"]
    arguments += [f"evaluate.micro_batch={batch}", "data.shuffle_lanes=1"]
    arguments += [f"tracking.log_every_steps={2 if tiny else 7}", f"checkpoint.every_steps={steps // 2}"]
    arguments += [f"data.workers_per_rank={1 if tiny else max(1, min(12, (os.cpu_count() or 1) - 2))}"]
    arguments += ["model.name=hornet_nano_gf", "data.resolution=64"] if tiny else []
    launcher = [str(ROOT / "launch" / "deepspeed.sh"), "pretrain", CONFIG, *arguments, *more]
    bare = str(ROOT / "tests" / "gpu" / "bare")
    environment = {**os.environ, "VENV": str(environment_of(bench.work)), "RANKS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([bare, os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            launcher,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, bench.left),
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        bench.note(f"left out for lack of time: the end of the run. Its last lines: {said[-1500:]}")
    else:
        if done.returncode:
            bench.note(f"failed: exit code {done.returncode}: {done.stdout[-4000:]}")
            return None
    return read_log(bench.work / "runs" / name / "log.jsonl")


def environment_of(work: Path) -> Path:
    """For the launcher's VENV: a folder whose bin/python is this interpreter."""
    folder = work / "environment"
    program = folder / "bin" / "python"
    if not program.exists():
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        program.chmod(0o755)
    return folder


def bare_images_per_second(bench: Bench) -> float | None:
    """Of the step alone, on images that are there."""
    batch, px = (2, 64) if bench.tiny else (64, 384)
    model = build(bench.device, bench.tiny, "7x7", "ours", px, DROP_PATH)
    set_policy(model, "selective")
    measured = measure_step(bench, model, batch, px)
    return None if isinstance(measured, str) else measured[0]
