"""What the demo's pretraining is worth: fine-tuning from it against the same configuration from random weights.

    python tests/bench/bench_demo.py [--seeds 3] [--formats]

Needs `make pretrain` first. Three seeds of each side under the real launcher; `--formats` also pretrains from the
`.beton` files. Prints top-1 by seed, means, and the ratio to the baseline (from scratch).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[2]


def top1(stage: str, name: str, *overrides: str) -> float:
    """Run a demo stage as `name` (a finished run is taken as it is) and return its validation top-1, percent."""
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
    return float(json.loads(summary.read_text())["top1"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--formats", action="store_true", help="also pretrain with data.format=ffcv")
    options = parser.parse_args()

    pretrained = top1("pretrain", "demo-pretrain")
    print(f"pretraining, webdataset  {pretrained:6.2f} %  (chance 2 %)")
    if options.formats:
        ffcv = top1("pretrain", "demo-pretrain-ffcv", "data.format=ffcv")
        print(f"pretraining, ffcv        {ffcv:6.2f} %  ratio to webdataset {ffcv / pretrained:.3f}")
    sides = {"from the pretraining": [], "from scratch": ["init.checkpoint=null"]}
    means = {}
    for side, overrides in sides.items():
        tag = "scratch" if overrides else "pretrained"
        found = [
            top1("finetune", f"bench-finetune-{tag}-{seed}", f"seed={seed}", *overrides)
            for seed in range(options.seeds)
        ]
        means[side] = mean(found)
        spread = f" +- {stdev(found):.2f}" if len(found) > 1 else ""
        print(f"fine-tuning {side:20}  {means[side]:6.2f} %{spread}  seeds: {', '.join(f'{v:.2f}' for v in found)}")
    print(f"ratio to the baseline (from scratch): {means['from the pretraining'] / means['from scratch']:.3f}")


if __name__ == "__main__":
    main()
