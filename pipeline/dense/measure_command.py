"""The command `evaluate-segment`: its options. The measuring itself, which imports torch, is in `measure.py`."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path

from pipeline.ranks.lifetime import leaving_by_exception

EPILOG = """\
examples
  its own validation images:  python -m pipeline evaluate-segment runs/NAME
  by windows:                 python -m pipeline evaluate-segment runs/NAME --mode slide --stride 341
  test-time augmentation:     python -m pipeline evaluate-segment runs/NAME --scales 0.5 0.75 1 1.25 1.5 1.75 --flip
  another set of its classes: python -m pipeline evaluate-segment runs/NAME --data data/other
  on several GPUs or cores:   python -m pipeline evaluate-segment runs/NAME --ranks 8
RUN/evaluations/NAME gets segmentation.json, per_class.csv, per_class.png and best_and_worst.png.
exit codes: 0 done, 1 error, 2 usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a run folder (its newest checkpoint) or a checkpoint")
    add("--data", metavar="DIR", help="another semantic set of the same classes")
    add("--weights", choices=("ema", "raw"), help="default: the EMA where there is one")
    add("--mode", choices=("whole", "slide"), help="the image at once, or windows of data.resolution (the run's own)")
    add("--stride", type=int, metavar="PIXELS", help="with slide: from window to window (the run's own)")
    add("--scales", type=float, nargs="+", metavar="S", help="probabilities are averaged over these (the run's own)")
    add("--flip", action="store_true", help="and over mirror images")
    add("--ranks", type=int, default=1, metavar="N", help="processes on this host (1)")
    add("--name", help="of the result folder; default: step, weights, data set and protocol")
    add("--out", type=Path, metavar="DIR", help="where evaluations/NAME is written; default: the run folder")
    add("--debug", action="store_true", help="tracebacks instead of one-line errors")


def command(options: argparse.Namespace) -> int:
    """The command with its options parsed; prints a table, returns the exit code. Raises CheckpointError, DataError."""
    from pipeline.checkpoints.files import refuse_missing

    refuse_missing(options.checkpoint)
    from pipeline.dense.measure import Asked, evaluate_segmentation

    names = ("checkpoint", "data", "weights", "mode", "stride", "flip", "name", "out")
    scales = None if options.scales is None else tuple(options.scales)
    asked = Asked(**{name: getattr(options, name) for name in names}, scales=scales)
    with nullcontext() if "RANK" in os.environ else leaving_by_exception():
        return evaluate_segmentation(asked, options.ranks)
