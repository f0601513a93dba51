"""Runs in processes of their own, by module or by the real launchers, and the configuration of a small one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.processes import PATIENCE_SECONDS

if TYPE_CHECKING:
    from tests.support.datasets import Datasets

ROOT = Path(__file__).parents[2]
RECORDER = ROOT / "tests" / "support" / "programs" / "recorder"  # to be on a run's PYTHONPATH


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m ...` in the project's root."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def launch(*arguments: str, ranks: int = 2, launcher: str = "deepspeed") -> subprocess.CompletedProcess[str]:
    """The real launcher script, on `ranks` gloo ranks."""
    return subprocess.run(
        [str(ROOT / "launch" / f"{launcher}.sh"), *arguments],
        cwd=ROOT,
        env=launch_environment(ranks),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def launch_environment(ranks: int = 2) -> dict[str, str]:
    return {**os.environ, "RANKS": str(ranks), "VENV": sys.prefix}


def small_run(datasets: Datasets, root: Path, *more: str, stage: str = "pretrain") -> list[str]:
    """Arguments of a run of seconds: the demo's configuration with other sizes."""
    return [
        stage,
        f"configs/demo_{stage}.yaml",
        f"data.path={datasets.in22k if stage == 'pretrain' else datasets.in1k}",
        f"output_root={root}",
        *("data.resolution=32", "data.workers_per_rank=0", "train.global_batch=16", "train.micro_batch=4"),
        *("train.epochs=3", "optimizer.warmup_epochs=0.5", "evaluate.every_epochs=3", "evaluate.micro_batch=8"),
        *("checkpoint.every_steps=5", "tracking.log_every_steps=1"),
        *more,
    ]


def log_of(root: Path, name: str) -> list[dict[str, float]]:
    """The lines of a run's log.jsonl that carry a training loss."""
    lines = [json.loads(line) for line in (root / name / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]
