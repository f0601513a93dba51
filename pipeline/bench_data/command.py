"""The command `bench-data`: its options. The measuring itself is in `measure.py`, imported when it is asked for."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="a YAML file; see configs/")
    add("overrides", nargs="*", metavar="key=value", help="dotted overrides, values as in YAML")
    add("--seconds", type=float, default=20.0, help="how long to measure (20)")
    add("--ranks-per-node", type=int, metavar="N", help="loaders at once; a run has one a GPU (GPUs here, or 1)")
    add("--nodes", type=int, default=1, metavar="N", help="of the run that is meant (1)")
    need = parser.add_mutually_exclusive_group()
    need.add_argument("--need", type=float, metavar="IMAGES_PER_SECOND", help="what the GPUs of one node take")
    need.add_argument("--run", type=Path, metavar="RUN_FOLDER", help="take that from a run's log", dest="of_run")
    add("--debug", action="store_true", help="tracebacks instead of one-line errors")


def command(options: argparse.Namespace) -> int:
    """The command with its options parsed; returns the exit code: 3 where the loader does not keep up."""
    from pipeline.bench_data.measure import run
    from pipeline.config.kinds import load_any

    config = load_any(options.config, options.overrides)
    speed = run(config, options.seconds, options.ranks_per_node, options.need, options.of_run, options.nodes)
    return 3 if speed.keeps_up is False else 0
