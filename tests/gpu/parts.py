"""The parts of run.sh: each in a process of its own with a share of the time, and what became of each.

    python -m tests.gpu.parts correct|speed [--parts NAME ...] [--output FOLDER] [--seconds 350] [--dry-run]

A part that fails, dies or hangs does not stop the next: one that is not done when its share is over is ended with all
that it started, and what others leave of theirs goes to those after them. So the whole ends in time, whatever happens.
Rows are Markdown on the standard output and JSON lines in FOLDER/correct.jsonl or speed.jsonl as they come. The exit
code is 1 where a check failed or did not end, else 0.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
SOFT = 0.85  # of a part's share: it begins nothing new after that
DRY_SECONDS = 3000.0  # a CPU's interpreter on a busy machine


class Part(NamedTuple):
    """`work`: module and function, which gets a Bench and returns whether all was right. `share`: seconds of 350."""

    name: str
    work: str
    share: float
    is_check: bool = False
    only_by_name: bool = False


PARTS = {
    "correct": [
        Part("kernels", "checks:check_kernels", 65, is_check=True),
        Part("slice", "checks:check_model", 55, is_check=True),
        Part("golden", "golden:check_golden", 25, is_check=True),
        Part("zero", "zero:check_stages", 105, is_check=True),
        Part("suite", "suite:run_marked", 50, is_check=True),
        Part("compiled", "checks:check_compiled", 50, is_check=True),
    ],
    "speed": [
        Part("depthwise", "operators:depthwise", 30),
        Part("kernels", "operators:other_kernels", 25),
        Part("models", "steps:models", 85),
        Part("run", "real_run:measure_run", 70),
        Part("memory", "memory:by_policy", 35),
        Part("profile", "where_time_goes:profile_step", 25),
        Part("graphs", "real_run:measure_graphs", 45),
        Part("compiled", "steps:compiled", 45),
        Part("batch", "steps:largest_batch", 60, only_by_name=True),
    ],
}
# For test_dry_run.py: what goes wrong goes wrong alone.
STAND_INS = {
    "raises": Part("raises", "stand_ins:raises", 20, is_check=True),
    "hangs": Part("hangs", "stand_ins:hangs", 3, is_check=True),
    "works": Part("works", "stand_ins:works", 20, is_check=True),
}


class Outcome(NamedTuple):
    part: Part
    verdict: str
    seconds: float
    rows: int
    left_out: int


def main() -> int:
    started = time.monotonic()
    args = arguments()
    if args.one is not None:
        return run_here(args)
    known = {part.name: part for part in PARTS[args.mode]} | (STAND_INS if args.stand_ins else {})
    unknown = [name for name in args.parts or () if name not in known]
    if unknown:
        print(f"error: --parts {unknown[0]}: {args.mode} has {', '.join(known)}", file=sys.stderr)
        return 2
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("error: torch sees no CUDA device here: --dry-run runs all of it small on the CPU", file=sys.stderr)
        return 1
    parts = [known[name] for name in args.parts] if args.parts else [p for p in known.values() if not p.only_by_name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`
    print(f"{args.mode}: torch {torch.__version__}, {'dry run on the CPU' if args.dry_run else 'CUDA'}", flush=True)
    with tempfile.TemporaryDirectory(prefix="tests-gpu-") as work:
        folder = Path(args.output or work)
        folder.mkdir(parents=True, exist_ok=True)
        args.file = folder / f"{args.mode}.jsonl"
        end = started + args.seconds - args.spent
        outcomes = []
        for number, part in enumerate(parts):
            share = part.share / sum(later.share for later in parts[number:])
            outcomes.append(run_apart(args, part, max(1.0, share * (end - time.monotonic())), work))
        if args.mode == "speed":
            print_targets(read_rows(args.file))
        return conclude(outcomes)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description="see tests/gpu/README.md")
    parser.add_argument("mode", choices=list(PARTS))
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these alone, in this order")
    parser.add_argument(
        "--output", metavar="FOLDER", help="JSON lines are appended to correct.jsonl, speed.jsonl there"
    )
    parser.add_argument("--seconds", type=float, help="for all parts together; 350 by default")
    parser.add_argument("--models", nargs="+", choices=("7x7", "gf"), default=["7x7", "gf"])
    parser.add_argument("--px", type=int, nargs="+", default=[384], help="image sizes that speed measures")
    parser.add_argument("--batch", type=int, default=64, help="images at 384 px; as many pixels at other sizes")
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU, kernels in Triton's interpreter")
    parser.add_argument("--spent", type=float, default=0.0, help=argparse.SUPPRESS)  # by run.sh, of the seconds
    for name in ("--one", "--file", "--work"):  # of the process of one part
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--stand-ins", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.seconds = args.seconds or (DRY_SECONDS if args.dry_run else 350.0)
    if args.dry_run:
        args.px = [64]
    return args


def run_apart(args: argparse.Namespace, part: Part, limit: float, work: str) -> Outcome:
    """One part in a session of its own, which is ended when `limit` seconds are over."""
    before = len(read_rows(args.file))
    command = [sys.executable, "-m", "tests.gpu.parts", args.mode, "--one", part.name, "--file", str(args.file)]
    command += ["--work", work, "--seconds", f"{SOFT * limit:.1f}", "--batch", str(args.batch)]
    command += ["--models", *args.models, "--px", *map(str, args.px)]
    environment = {**os.environ}
    if args.dry_run:
        command.append("--dry-run")
        # Before torch and timm import Triton.
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        environment.setdefault("OMP_NUM_THREADS", "1")
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(limit)
        verdict = "passed" if code == 0 else "FAILED" if code == 1 else f"FAILED (exit code {code})"
    except subprocess.TimeoutExpired:
        verdict = f"OUT OF TIME ({limit:.0f} s)"
    finally:
        end_session(process)
    rows = read_rows(args.file)[before:]
    left_out = sum(str(row.get("note", "")).startswith("left out") for row in rows)
    outcome = Outcome(part, verdict, time.monotonic() - begun, sum("note" not in row for row in rows), left_out)
    with open(args.file, "a", encoding="utf-8") as file:
        file.write(json.dumps({"part": part.name, "verdict": verdict, "seconds": outcome.seconds}) + "\n")
    return outcome


def end_session(process: subprocess.Popen) -> None:
    """What it started goes with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def leave_with(parent: int) -> None:
    """A part whose parent is gone ends, with all that it started."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def run_here(args: argparse.Namespace) -> int:
    """The process of one part; returns its exit code."""
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
    (part,) = [part for part in (*PARTS[args.mode], *STAND_INS.values()) if part.name == args.one]
    from tests.gpu.timing import Bench

    bench = Bench(args, part.name)
    module, function = part.work.split(":")
    try:
        right = getattr(importlib.import_module(f"tests.gpu.{module}"), function)(bench)
    except Exception as error:
        bench.note(f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        raise
    return 0 if right else 1


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines: a part that was ended may have left half of one."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def print_targets(rows: list[dict[str, Any]]) -> None:
    """What was wanted before any run, beside the best that was found, compiled or not, at 384 px."""
    rows = [row for row in rows if row.get("px") == 384 and isinstance(row.get("images_s"), float)]
    eager = {(row["what"], row["model"]): row for row in rows if row["part"] == "models"}
    print("\n## targets at 384 px\n\n| what | wanted | best found |\n|---|---|---|")
    for model, wanted in (("7x7", 2.4), ("gf", 4.0)):
        ours = [row for row in rows if row.get("model") == model and row["what"].startswith("ours")]
        published, peer = eager.get(("published", model)), eager.get(("ConvNeXt-L", ""))
        found = {
            f"images/s to the published structure's | {wanted}": published and ("images_s", published["images_s"]),
            "MFU | 0.45": ("mfu", 1.0),
            "GMAC/s to ConvNeXt-L's | 1": peer and ("gmac_s", peer["gmac_s"]),
        }
        for what, measured in found.items():
            key, base = measured or ("images_s", math.inf)
            best = max((row[key] / base for row in ours if row.get(key)), default=0.0)
            print(f"| {model}: {what} | {f'{best:.3g}' if best else ''} |")


def conclude(outcomes: list[Outcome]) -> int:
    print("\n## what became of each part\n\n| part | | seconds | rows | left out |\n|---|---|---|---|---|")
    for part, verdict, seconds, rows, left_out in outcomes:
        print(f"| {part.name} | {verdict} | {seconds:.0f} | {rows} | {left_out or ''} |")
    wrong = [outcome.part.name for outcome in outcomes if outcome.part.is_check and outcome.verdict != "passed"]
    print(f"\n{'NOT RIGHT: ' + ', '.join(wrong) if wrong else 'no check failed'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
