"""The command `evaluate`: its options. The measuring itself, which imports torch, is in `measure.py`."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path

from pipeline.ranks.lifetime import leaving_by_exception

EPILOG = """\
examples
  its own validation images:       python -m pipeline evaluate runs/NAME
  one checkpoint, without the EMA: python -m pipeline evaluate runs/NAME/checkpoints/best --weights raw
  another data set:                python -m pipeline evaluate runs/NAME --data data/in1k
  test sets as they are published: python -m pipeline evaluate runs/NAME --data imagenetv2-matched-frequency-format-val
                                   python -m pipeline evaluate runs/NAME --data imagenet-a
  ReaL's labels of ImageNet-1K:    python -m pipeline evaluate runs/NAME --data imagenet/val --real
  at 384 px, as published:         python -m pipeline evaluate runs/NAME --resolution 384
  all GPUs here:                   launch/deepspeed.sh evaluate runs/NAME
Classes go by WordNet id: predictions are made among those of the data set, whatever else the head knows.
The result folder, RUN/evaluations/NAME, is described in pipeline/evaluation/README.md.
exit codes: 0 done, 1 error, 2 usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a run folder (its newest checkpoint) or a checkpoint folder",
    )
    add("--data", metavar="DIR", help="another data set (folder or URL), or a folder of images with a folder a class")
    add(
        "--weights",
        type=lambda text: "raw" if text == "model" else text,
        choices=("ema", "raw"),
        help="default: the EMA where there is one",
    )
    add("--resolution", type=int, metavar="PIXELS", help="with the published crop; default: the run's own of both")
    add("--real", nargs="?", const="", metavar="FILE", help="score ReaL's labels: timm's copy, or a real.json")
    add("--ranks", type=_at_least_one, default=1, metavar="N", help="processes on this host; default: 1")
    add("--name", help="of the result folder; default: step, weights and data set")
    add("--out", type=Path, metavar="DIR", help="where evaluations/NAME is written; default: the run folder")
    add("--check", action="store_true", help="only look whether it can be done")
    add("--debug", action="store_true", help="tracebacks instead of one-line errors")
    add("--nodes", type=int, help=argparse.SUPPRESS)  # of --check, by the launchers
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # old launchers pass it


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of ranks")
    return int(text)


def command(options: argparse.Namespace) -> int:
    """The command with its options parsed; prints a table, returns the exit code. Raises CheckpointError, DataError."""
    from pipeline.checkpoints.files import refuse_missing

    refuse_missing(options.checkpoint)
    from pipeline.evaluation.measure import Asked, evaluate_checkpoint

    names = ("checkpoint", "data", "weights", "resolution", "real", "name", "out")
    asked = Asked(**{name: getattr(options, name) for name in names})
    with nullcontext() if "RANK" in os.environ else leaving_by_exception():
        return evaluate_checkpoint(asked, options.ranks, options.check)
