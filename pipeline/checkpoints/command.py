"""The command `checkpoint`: its options. What it prints is made by `inspect.py`, imported when it is asked for."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """\
examples
  all of a run's:       python -m pipeline checkpoint runs/NAME
  the same, each byte:  python -m pipeline checkpoint runs/NAME --hashes
  one of them:          python -m pipeline checkpoint runs/NAME/checkpoints/latest
  its tensors' norms:   python -m pipeline checkpoint runs/NAME/checkpoints/best --tensors
kept because: last (keep_last), every (keep_every_steps), best (best_metric), rewind (the guard goes back to it).
A damaged one is passed over by the next start, which renames it to damaged-step-...: delete that when you have seen it.
exit codes: 0 all whole, 1 one is damaged or there is none, 2 usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="a run folder: all of its checkpoints; a checkpoint folder: that one")
    add("--hashes", action="store_true", help="run folder: check every byte of each, not sizes alone")
    add("--tensors", action="store_true", help="checkpoint folder: list each tensor with shape, dtype and L2 norm")
    add("--debug", action="store_true", help="tracebacks instead of one-line errors")


def command(options: argparse.Namespace) -> int:
    """The command with its options parsed; returns the exit code: 1 where something is damaged."""
    from pipeline.checkpoints.inspect import show

    return 0 if show(options.path, options.hashes, options.tensors) else 1
