"""The command `sync-tracking`: its options, and the runs named. `sync.py`, which imports torch, tells of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.config.sections import ConfigError
from pipeline.records.run_id import CONFIG_FILE

EPILOG = """\
examples
  python -m pipeline sync-tracking runs/pretrain-hornet-l-in22k-384
  python -m pipeline sync-tracking                 every run under runs/
A run sends to MLflow as it goes, again and again where MLflow does not answer. This is for runs that have ended
meanwhile. What MLflow has already is not sent twice, so the command can be given at any time, and again.
It goes where the run went: tracking.uri, or MLFLOW_TRACKING_URI as it was then; users and passwords of an address are
not kept: give them by MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
exit codes: 0 MLflow has all of every run, 1 it has not, 2 usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    add("paths", type=Path, nargs="*", metavar="RUN", help="run folders, or folders of many (runs)")
    add("--debug", action="store_true", help="tracebacks instead of one-line errors")


def command(options: argparse.Namespace) -> int:
    """Sync each run; the exit code. Raises ConfigError for a folder that is none."""
    runs, code = _runs(options.paths or [Path("runs")]), 0
    from pipeline.records.sync import sync

    for run_dir in runs:
        try:
            print(f"{run_dir}: {sync(run_dir)}", flush=True)
        except Exception as error:  # of one run: the others are told of all the same
            if options.debug or not isinstance(error, ValueError | OSError):
                raise
            print(f"error: {run_dir}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            code = 1
    return code


def _runs(paths: list[Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for path in paths:
        inside = [path]
        if not (path / CONFIG_FILE).is_file():
            inside = sorted(each.parent for each in path.glob(f"*/{CONFIG_FILE}"))
        if not inside:
            raise ConfigError(f"{path} is no run's folder and has none in it: name output_root/name of a configuration")
        found |= dict.fromkeys(inside)
    return list(found)
