"""The command `stop`: a run, on whatever hosts its ranks are, writes a checkpoint and ends with exit code 75."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from pipeline.config.sections import ConfigError
from pipeline.ranks.lifetime import ask_to_stop, holder_of, withdraw_stop

EPILOG = """\
examples
  python -m pipeline stop runs/pretrain-hornet-l-in22k-384
  make stop RUN=runs/pretrain-hornet-l-in22k-384
From any host that sees the run folder. The command that started the run goes on with it.
exit codes: 0 the run has stopped, 1 it has not, or nothing runs there."""
_LOOK_SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="the run folder: output_root/name")
    parser.add_argument(
        "--wait", type=float, default=900.0, metavar="SECONDS", help="for its last checkpoint; 0: ask, and leave (900)"
    )
    parser.add_argument("--debug", action="store_true", help="tracebacks instead of one-line errors")


def command(options: argparse.Namespace) -> int:
    """Ask, and wait until nobody writes to the run folder. Raises ConfigError where nothing runs there."""
    if not options.folder.is_dir():
        raise ConfigError(f"no run folder {options.folder}: RUN is output_root/name of its configuration")
    holder = holder_of(options.folder)
    if holder is None:
        raise ConfigError(f"nothing runs in {options.folder} (or it has not begun: try again)")
    ask_to_stop(options.folder, "make stop")
    print(f"{options.folder}: {holder} is asked to stop, at the end of its step and with a checkpoint", flush=True)
    shown, started = sys.stderr.isatty(), time.monotonic()
    while (seconds := time.monotonic() - started) < options.wait:
        if holder_of(options.folder) is None:
            withdraw_stop(options.folder)
            print(f"{options.folder}: stopped after {seconds:.0f} s; {_newest(options.folder)}")
            return 0
        if shown:
            print(f"\r  {seconds:.0f} s", end="", file=sys.stderr, flush=True)
        time.sleep(_LOOK_SECONDS)
    if not options.wait:
        return 0
    raise ConfigError(
        f"{options.folder} still runs after {options.wait:.0f} s, {holder}: a step, an evaluation or a checkpoint may "
        f"take longer (--wait); a rank that hangs is named by the run itself within guard.stall_seconds"
    )


def _newest(run: Path) -> str:
    found = sorted(path.name for path in (run / "checkpoints").glob("step-*") if path.is_dir())
    return f"its newest checkpoint is {found[-1]}" if found else "it has no checkpoint: the same command starts over"
