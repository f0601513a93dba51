"""What the demo's pretraining is worth: fine-tuning from it against the same configuration from random weights.

    python tests/bench/bench_demo.py [--seeds 5] [--ema-decay 0.95] [--formats]

Needs `make pretrain` first. Five seeds of each side under the real launcher; `--formats` also pretrains from the
`.beton` files. Prints top-1 by seed of the EMA and of the raw weights, means with their 95 % interval (Student's t over
seeds), what the EMA is worth seed by seed, and the ratio to the baseline (from scratch).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import t as student

ROOT = Path(__file__).parents[2]


class Top1(NamedTuple):
    """Validation top-1 of a run's end, percent."""

    ema: float
    raw: float


def ended(stage: str, name: str, *overrides: str) -> Top1:
    """Run a demo stage as `name`; a finished run is taken as it is."""
    summary = ROOT / "runs" / name / "summary.json"
    if not summary.exists():
        print(f"... {name}", flush=True)
        command = [
            str(ROOT / "launch" / "deepspeed.sh"),
            "pretrain" if "init.checkpoint=null" in overrides else stage,
            f"configs/demo_{stage}.yaml",
            f"name={name}",
            *overrides,
        ]
        environment = {**os.environ, "VENV": os.environ.get("VENV", sys.prefix)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = json.loads(summary.read_text())
    return Top1(float(found["top1"]), float(found["top1_model"]))


def with_interval(values: list[float]) -> str:
    """The mean and half the width of its 95 % interval."""
    if len(values) < 2:
        return f"{mean(values):6.2f}"
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / sqrt(len(values))
    return f"{mean(values):6.2f} +- {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ema-decay", type=float, help="of the fine-tuning; default: the configuration's")
    parser.add_argument("--formats", action="store_true", help="also pretrain with data.format=ffcv")
    options = parser.parse_args()

    pretrained = ended("pretrain", "demo-pretrain")
    print(f"pretraining, webdataset  {pretrained.ema:6.2f} % (raw {pretrained.raw:.2f})  (chance 2 %)")
    if options.formats:
        ffcv = ended("pretrain", "demo-pretrain-ffcv", "data.format=ffcv")
        print(f"pretraining, ffcv        {ffcv.ema:6.2f} %  ratio to webdataset {ffcv.ema / pretrained.ema:.3f}")
    decay = [] if options.ema_decay is None else [f"optimizer.ema_decay={options.ema_decay}"]
    sides = {"from the pretraining": [], "from scratch": ["init.checkpoint=null"]}
    means = {}
    for side, overrides in sides.items():
        tag = "-".join(["scratch" if overrides else "pretrained", *(f"{d:g}" for d in [options.ema_decay] if d)])
        runs = [
            ended("finetune", f"bench-finetune-{tag}-{seed}", f"seed={seed}", *overrides, *decay)
            for seed in range(options.seeds)
        ]
        means[side] = mean(run.ema for run in runs)
        print(f"fine-tuning {side}, mean and 95 % interval over {len(runs)} seeds")
        print(f"  EMA {with_interval([run.ema for run in runs])} %  {', '.join(f'{run.ema:.2f}' for run in runs)}")
        print(f"  raw {with_interval([run.raw for run in runs])} %  {', '.join(f'{run.raw:.2f}' for run in runs)}")
        print(f"  EMA - raw, by seed {with_interval([run.ema - run.raw for run in runs])}")
    print(f"ratio to the baseline (from scratch): {means['from the pretraining'] / means['from scratch']:.3f}")


if __name__ == "__main__":
    main()
