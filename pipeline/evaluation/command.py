"""The command `evaluate`: its options. The measuring itself, which imports torch, is in `accuracy.py`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("checkpoint", type=Path, help="a run folder (its newest checkpoint) or a checkpoint folder")
    add("--data", help="another data set (folder or URL) with the same classes")
    add("--weights", choices=("ema", "model"), help="default: the EMA where there is one")
    add("--debug", action="store_true", help="tracebacks instead of one-line errors")


def command(options: argparse.Namespace) -> int:
    """The command with its options parsed; prints a table, returns the exit code. Raises CheckpointError, DataError."""
    from pipeline.evaluation.accuracy import evaluate_checkpoint

    evaluate_checkpoint(options.checkpoint, options.data, options.weights)
    return 0
