"""What a command costs before and after its work: this checkout against another, turn by turn.

    python tests/bench/bench_launch.py [--before 8e2bc49] [--rounds 5] [--quick-rounds 9]

The other one is a revision, or the folder of a checkout. Both run in this environment, on the same small data set and
pretrained run, made here. Wall seconds:

- first step: `launch/deepspeed.sh finetune configs/demo_finetune.yaml`, two gloo ranks, from the command to the line of
  the first step;
- end: of the same run, from the title of its last table to the exit of the command;
- a line each for `--help` and for faults that `--check` refuses, alone.

The ratio is ours to theirs: its median over the rounds, and its range.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEFORE = "8e2bc49"  # the last one whose check imported torch
sys.path.insert(0, str(ROOT))
from tests.support.datasets import Datasets, build_datasets  # noqa: E402
from tests.support.runs import small_run  # noqa: E402

CHECK = ("pretrain", "configs/demo_pretrain.yaml", "--check", "--ranks", "2")
# What is measured alone: a name, and the words after `python -m`; {in22k} and {nothing} are folders.
QUICK = {
    "pipeline --help": ("pipeline", "--help"),
    "pretrain --help": ("pipeline", "pretrain", "--help"),
    "checkpoint --help": ("pipeline", "checkpoint", "--help"),
    "bench-data --help": ("pipeline", "bench-data", "--help"),
    "data_prep --help": ("data_prep", "--help"),
    "a key that does not exist": ("pipeline", *CHECK, "train.epoch=3"),
    "a batch that ranks do not divide": ("pipeline", *CHECK, "data.path={in22k}", "train.global_batch=62"),
    "no such data set": ("pipeline", *CHECK, "data.path={nothing}"),
    "no such model": ("pipeline", *CHECK, "data.path={in22k}", "model.name=hornet_nan_gf"),
    "too few images for a batch": ("pipeline", *CHECK, "data.path={in22k}", "train.global_batch=512"),
    "no such checkpoint": ("pipeline", *CHECK, "data.path={in22k}", "init.checkpoint={nothing}"),
    "nothing wrong": ("pipeline", *CHECK, "data.path={in22k}"),
}


def launched(checkout: Path, arguments: list[str]) -> tuple[float, float]:
    """Seconds from the command to its first step, and from its last table to its exit."""
    started, first, last = time.monotonic(), 0.0, 0.0
    process = subprocess.Popen(
        [str(checkout / "launch" / "deepspeed.sh"), *arguments],
        cwd=checkout,
        env={**os.environ, "RANKS": "2", "VENV": sys.prefix},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if not first and line.startswith("step "):
            first = time.monotonic()
        if line.rstrip().endswith(": done"):
            last = time.monotonic()
    if process.wait() or not first or not last:
        sys.exit(f"{checkout}: the run failed\n{''.join(lines)}")
    return first - started, time.monotonic() - last


def quick(checkout: Path, words: list[str]) -> float:
    """Wall seconds of one command, whose exit code is 0 or 1."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", *words], cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"{checkout}: {' '.join(words)} ended with {done.returncode}\n{done.stderr}")
    return time.monotonic() - started


def alternate(checkouts: list[Path], rounds: int, measure: Callable[[Path], tuple[float, ...]]) -> list[list[tuple]]:
    """What `measure` gives of each checkout, round by round; who comes first changes with every round."""
    found: list[list[tuple]] = [[] for _ in checkouts]
    for number in range(rounds + 1):
        order = list(enumerate(checkouts))[:: 1 if number % 2 else -1]
        for place, checkout in order:
            measured = measure(checkout)
            if number:  # the first warms the disk's cache and writes compiled modules
                found[place].append(measured)
    return found


def row(name: str, theirs: list[float], ours: list[float]) -> None:
    ratios = [b / a for a, b in zip(theirs, ours, strict=True)]
    medians = f"{statistics.median(theirs):.2f} | {statistics.median(ours):.2f}"
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
    print(f"| {name} | {medians} | **{statistics.median(ratios):.2f}** ({spread}) |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--before", default=BEFORE, metavar="REVISION", help=f"or a folder; what to compare with ({BEFORE})"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of whole runs (5)")
    parser.add_argument("--quick-rounds", type=int, default=9, help="of the other commands (9)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, checked_out(options.before, Path(scratch) / "before") as before:
        folder = Path(scratch)
        datasets = build_datasets(folder / "data")
        measure_all([before, ROOT], folder, datasets, options)


@contextmanager
def checked_out(other: str, folder: Path) -> Iterator[Path]:
    """The other version's checkout: where it is one already, else made at `folder` for the time being."""
    if (Path(other) / "launch" / "deepspeed.sh").exists():
        yield Path(other).resolve()
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    if subprocess.run([*git, "add", "--quiet", "--detach", str(folder), other], check=False).returncode:
        sys.exit(f"{other} is neither a checkout nor a revision of this one: give one with --before")
    try:
        for decoder in (ROOT / "pipeline" / "data").glob("_jpeg*.so"):
            shutil.copy(decoder, folder / "pipeline" / "data")
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def measure_all(checkouts: list[Path], folder: Path, datasets: Datasets, options: argparse.Namespace) -> None:
    """Print the table."""
    launched(ROOT, small_run(datasets, folder / "pretrained"))
    weights = f"init.checkpoint={folder / 'pretrained' / 'demo-pretrain'}"

    def whole_run(checkout: Path) -> tuple[float, float]:
        runs = folder / "runs"
        shutil.rmtree(runs, ignore_errors=True)
        return launched(checkout, small_run(datasets, runs, weights, stage="finetune"))

    print(f"load {os.getloadavg()[0]:.1f} before it began; {os.cpu_count()} cores\n")
    print("| seconds | before | now | ratio |\n|---|---|---|---|")
    theirs, ours = alternate(checkouts, options.rounds, whole_run)
    for place, name in enumerate(("command to first step", "last table to exit")):
        row(name, [each[place] for each in theirs], [each[place] for each in ours])
    for name, words in QUICK.items():
        filled = [word.format(in22k=datasets.in22k, nothing=folder / "nothing") for word in words]
        theirs, ours = alternate(
            checkouts, options.quick_rounds, lambda checkout, filled=filled: (quick(checkout, filled),)
        )
        row(name, [each[0] for each in theirs], [each[0] for each in ours])


if __name__ == "__main__":
    main()
