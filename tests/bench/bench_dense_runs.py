"""Whole runs of a dense task, seed by seed, in several variants: their scores, and how sure a difference is.

    python tests/bench/bench_dense_runs.py segment pretrained= random=init.checkpoint=null
    python tests/bench/bench_dense_runs.py detect horfpn= fpn=model.pyramid=fpn --at-once 1

A variant is NAME=overrides, with commas between them; the first one is the baseline. All are the configuration's run
but for these, so with one seed variants see the same crops at the same steps. Scores are those of the last evaluation.
Intervals are Student's, of 95 %, over seeds: of a variant's mean, and of its difference to the baseline, seed by seed.

The same command goes on where it was interrupted; OUTPUT/runs/ has what each run leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIGS = {"segment": "configs/demo_segment.yaml", "detect": "configs/demo_detect.yaml"}
SCORES = {"segment": ("miou", "pixel_accuracy"), "detect": ("box_ap", "box_ap50", "mask_ap")}
CONFIDENCE = 0.95


class Variant(NamedTuple):
    """Overrides of a configuration, under a name."""

    name: str
    overrides: tuple[str, ...]


def variant(text: str) -> Variant:
    """Of a word of the command line. Raises ValueError."""
    name, given, overrides = text.partition("=")
    if not name or not given:
        raise ValueError(text)
    return Variant(name, tuple(each for each in overrides.split(",") if each))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of the interval's width; nan for one value."""
    array = np.asarray(values)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return float(array.mean()), float(half)


def run(task: str, config: str, output: Path, each: Variant, seed: int, threads: int) -> dict[str, float]:
    """Train one, unless it is done; its summary."""
    name = f"{task}-{each.name}-{seed}"
    summary = output / "runs" / name / "summary.json"
    if not summary.exists():
        where = [
            f"output_root={output / 'runs'}",
            f"name={name}",
            f"seed={seed}",
            f"tracking.uri=sqlite:///{output / 'mlflow.db'}",
        ]
        words = [sys.executable, "-m", "pipeline", task, config, *where, *each.overrides]
        with open(output / f"{name}.txt", "w") as log:
            done = subprocess.run(
                words, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_THREAD_LIMIT": str(threads)}
            )
        if done.returncode:
            sys.exit(f"{name} ended with {done.returncode}: see {log.name}")
    print(f"{name} is done", flush=True)
    return json.loads(summary.read_text())


def main() -> None:
    """Run all, then print a row a variant and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=CONFIGS)
    parser.add_argument("variants", nargs="+", type=variant, metavar="NAME=OVERRIDES")
    parser.add_argument("--config", help="another configuration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at-once", type=int, default=2, help="runs beside each other, which share the cores (2)")
    parser.add_argument("--output", type=Path, default=Path("runs/dense-runs"))
    options = parser.parse_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    # Two runs with a thread a core each wait for each other at every barrier: 7 times the CPU time.
    threads = max(1, (os.cpu_count() or 1) // options.at_once)
    config = options.config or CONFIGS[options.task]
    with ThreadPoolExecutor(options.at_once) as pool:
        asked = [(seed, each) for seed in options.seeds for each in options.variants]
        jobs = {
            (each.name, seed): pool.submit(run, options.task, config, output, each, seed, threads)
            for seed, each in asked
        }
        done = {key: job.result() for key, job in jobs.items()}
    baseline = options.variants[0].name
    print(f"{len(options.seeds)} seeds, intervals of {CONFIDENCE:.0%}")
    print(f"| variant | score | mean | +- | by seed | minus {baseline} | +- |\n|---|---|---|---|---|---|---|")
    for score in SCORES[options.task]:
        for each in options.variants:
            values = [done[each.name, seed].get(score, float("nan")) for seed in options.seeds]
            others = [done[baseline, seed].get(score, float("nan")) for seed in options.seeds]
            (mean, half), by_seed = interval(values), ", ".join(f"{value:.2f}" for value in values)
            gain, sure = interval([value - other for value, other in zip(values, others, strict=True)])
            beside = " | " if each.name == baseline else f"{gain:+.2f} | {sure:.2f}"
            print(f"| {each.name} | {score} | {mean:.2f} | {half:.2f} | {by_seed} | {beside} |")


if __name__ == "__main__":
    main()
