"""The command `review`: its options. The server is in `review.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.ranks.ports import PortError, read_port
from pipeline.records.review_address import REVIEW_PORT

EPILOG = """\
examples
  all runs under runs/:   python -m pipeline review
  the page of one:        python -m pipeline review runs/NAME
  elsewhere:              python -m pipeline review /big/runs --port 5001
Ctrl-C ends it. From another machine: ssh -L 5000:127.0.0.1:5000 HOST, then the same address.
exit codes: 0 ended by Ctrl-C or SIGTERM, 1 error, 2 usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add(
        "path",
        type=Path,
        nargs="?",
        default=Path("runs"),
        metavar="PATH",
        help="the folder of the runs, which holds mlflow.db (runs), or one run's folder",
    )
    add(
        "--port",
        type=_port,
        default=REVIEW_PORT,
        metavar="PORT",
        help=f"of this host alone, which the server listens on ({REVIEW_PORT})",
    )
    add("--debug", action="store_true", help="tracebacks instead of one-line errors")


def _port(text: str) -> int:
    try:
        return read_port("PORT", text)
    except PortError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def command(options: argparse.Namespace) -> int:
    """The command with its options parsed; returns the exit code. Raises ReviewError, PortError."""
    from pipeline.records.review import review

    review(options.path, options.port)
    return 0
