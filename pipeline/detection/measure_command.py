"""The command `evaluate-detect`: its options. The measuring itself, which imports torch, is in `measure.py`."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path

from pipeline.ranks.lifetime import leaving_by_exception

EPILOG = """\
examples
  its own validation images:  python -m pipeline evaluate-detect runs/NAME
  test-time augmentation:     python -m pipeline evaluate-detect runs/NAME --flip
  another set of its classes: python -m pipeline evaluate-detect runs/NAME --data data/other
  on several GPUs or cores:   python -m pipeline evaluate-detect runs/NAME --ranks 8
RUN/evaluations/NAME gets detection.json, per_class.csv, per_class.png, precision_recall.png and best_and_worst.png.
exit codes: 0 done, 1 error, 2 usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a run folder (its newest checkpoint) or a checkpoint")
    add("--data", metavar="DIR", help="another instance set of the same classes")
    add("--weights", choices=("ema", "raw"), help="default: the EMA where there is one")
    add("--flip", action="store_true", help="boxes of the mirrored image join in")
    add("--ranks", type=int, default=1, metavar="N", help="processes on this host (1)")
    add("--name", help="of the result folder; default: step, weights, data set and protocol")
    add("--out", type=Path, metavar="DIR", help="where evaluations/NAME is written; default: the run folder")
    add("--debug", action="store_true", help="tracebacks instead of one-line errors")


def command(options: argparse.Namespace) -> int:
    """The command with its options parsed; prints a table, returns the exit code. Raises CheckpointError, DataError."""
    from pipeline.checkpoints.files import refuse_missing

    refuse_missing(options.checkpoint)
    from pipeline.dense.measuring import Asked
    from pipeline.detection.measure import evaluate_detection

    names = ("checkpoint", "data", "weights", "flip", "name", "out")
    asked = Asked(**{name: getattr(options, name) for name in names})
    with nullcontext() if "RANK" in os.environ else leaving_by_exception():
        return evaluate_detection(asked, options.ranks)
