"""The command `review`: runs compared in the terminal, as one page, and in MLflow."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.storage import Folder, refuse_unwritable
from pipeline.ranks.ports import PortError, read_port, require_free
from pipeline.records.review_address import REVIEW_PORT

PAGE_NAME = "review.html"
_RUNS = 20

EPILOG = """\
examples
  all runs under runs/:     python -m pipeline review
  two of them:              python -m pipeline review runs/first runs/second
  the page elsewhere:       python -m pipeline review --html ~/compared.html
  MLflow's pages beside it: python -m pipeline review --mlflow     (Ctrl-C ends its server)
The page is one file: it needs no server and no network, so it can be copied or sent as it is.
MLflow from another machine: ssh -L 5000:127.0.0.1:5000 HOST, then the same address.
exit codes: 0 done, or MLflow ended by Ctrl-C or SIGTERM, 1 error, 2 usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add(
        "paths",
        type=Path,
        nargs="*",
        metavar="RUN",
        help="folders of runs, or folders of many (runs)",
    )
    add(
        "--html",
        type=_file,
        metavar="FILE",
        help=f"where the page is written ({PAGE_NAME} beside the runs)",
    )
    add("--newest", type=_count, default=_RUNS, metavar="N", help=f"take so many runs at most, the newest ({_RUNS})")
    add("--mlflow", action="store_true", help="also start MLflow's server on the same runs, until it is ended")
    add(
        "--port",
        type=_port,
        default=REVIEW_PORT,
        metavar="PORT",
        help=f"of this host alone, which MLflow's server listens on ({REVIEW_PORT})",
    )
    add("--debug", action="store_true", help="tracebacks instead of one-line errors")


def _port(text: str) -> int:
    try:
        return read_port("PORT", text)
    except PortError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _file(text: str) -> Path:
    path = Path(text).expanduser()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{path}: is a device or a pipe, and the page takes its place: name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}: make it first")
    return path


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 200:
        raise argparse.ArgumentTypeError(f"{text}: how many runs, from 1 to 200")
    return int(text)


def command(options: argparse.Namespace) -> int:
    """The command with its options parsed; returns the exit code. Raises ReviewError, PortError, StorageError."""
    from pipeline.review.mlflow_server import find_server, serve
    from pipeline.review.run import ReviewError, find_runs
    from pipeline.review.write import write_review

    asked = options.paths or [Path("runs")]
    paths = find_runs(asked)
    server = None
    if options.mlflow:  # what could not work is told before anything is read
        require_free("PORT", options.port, "127.0.0.1")
        server = find_server(asked, options.port)
    left_out = paths[: -options.newest]
    if left_out:
        print(f"the newest {options.newest} of {len(paths)} runs: name others, or --newest N", flush=True)
    paths = paths[-options.newest :]
    beside = asked[0].parent if asked[0] in paths else asked[0]
    page = options.html or beside / PAGE_NAME
    refuse_unwritable(Folder(str(page.absolute().parent)), "name another place with --html FILE")
    try:
        write_review(paths, page, options.port, server.address if server else None)
    except OSError as error:
        reason = error.strerror or error
        raise ReviewError(f"{page} cannot be written: {reason}: name another place with --html FILE") from None
    print(f"open in a browser: {page.resolve().as_uri()}", flush=True)
    if server is not None:
        serve(server, options.port)
    return 0
