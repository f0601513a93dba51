"""MLflow's server on a run database, until it is ended; says which pages show runs as soon as it answers."""

from __future__ import annotations

import http.client
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from pipeline.records.review_address import direct_run_address, experiment_address, review_base, run_address
from pipeline.review.mlflow_pages import database_of, known_run
from pipeline.review.run import ReviewError, find_runs

_START_SECONDS = 600.0  # it takes ten; a database of an older MLflow is converted first
_END_SECONDS = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Experiment(NamedTuple):
    """One that has runs. newest: the name of the last that began."""

    id: str
    name: str
    runs: int
    newest: str


class Server(NamedTuple):
    """What shows the runs: `address` is its first page, `pages` are all, as they are told; `database`: None where it
    runs elsewhere.
    """

    database: Path | None
    address: str
    pages: list[str]


def find_server(paths: list[Path], port: int) -> Server:
    """MLflow's server for folders of runs, or run folders, of one database. Nothing is started. Raises ReviewError."""
    found: dict[Path, list[str]] = {}
    elsewhere: list[str] = []
    for path in paths:
        if (path / "mlflow.db").is_file():
            found.setdefault((path / "mlflow.db").resolve(), [])
    for path in find_runs([path for path in paths if not (path / "mlflow.db").is_file()]):
        known = known_run(path)
        if known is None:
            raise ReviewError(
                f"{path} has no mlflow.db, and no run that MLflow knows: leave out --mlflow (REVIEW=page)"
            )
        if known.uri.startswith(("http://", "https://")):
            elsewhere.append(direct_run_address(known.uri, known.run_id))
            continue
        database = database_of(path, known)
        if database is None:
            raise ReviewError(
                f"{path} is there, and {known.uri}, which its numbers went to, is not a file that is here"
            )
        found.setdefault(database.resolve(), []).append(known.run_id)
    if len(found) + bool(elsewhere) > 1:
        raise ReviewError(
            f"these runs are in {len(found) + bool(elsewhere)} places of MLflow: review them apart, or without --mlflow"
        )
    for database, run_ids in found.items():
        pages = list(_pages(database, run_ids, review_base(port)))
        return Server(database, pages[0][0], [told for _, told in pages])
    return Server(None, elsewhere[0], elsewhere)


def serve(server: Server, port: int) -> None:
    """Start it on a port of this host, say what to open, and return on SIGINT or SIGTERM, when it has ended.

    One that runs elsewhere is only told of. Raises ReviewError.
    """
    if server.database is None:
        print("and in MLflow:", *server.pages, sep="\n  ", flush=True)
        return
    print(f"MLflow starts on {server.database} (ten seconds or more)", flush=True)
    try:
        with _server(server.database, port) as process:
            _wait_until_it_answers(process, port)
            print("and in MLflow (Ctrl-C here ends it):", *server.pages, sep="\n  ", flush=True)
            process.wait()
    except KeyboardInterrupt:
        print("MLflow has ended", flush=True)
        return
    raise ReviewError(f"MLflow's server ended by itself, with code {process.returncode}")


def _pages(database: Path, run_ids: list[str], base: str) -> Iterator[tuple[str, str]]:
    """Address and words of each experiment that has runs, the newest first; of the runs that were asked for, alone."""
    experiments, experiment_of = _read(database)
    if not experiments:
        raise ReviewError(f"{database} has no run yet: `make pretrain` first")
    if not run_ids:
        width = max(len(experiment.name) for experiment in experiments)
        for each in experiments:
            count = f"{each.runs} run{'s' if each.runs > 1 else ''}, newest {each.newest}"
            address = experiment_address(base, each.id)
            yield address, f"{each.name:{width}}  {address}  ({count})"
    for run_id in run_ids:
        if run_id not in experiment_of:
            raise ReviewError(f"{database} has no run {run_id}: was it deleted?")
        address = run_address(base, experiment_of[run_id], run_id)
        yield address, address


def _read(path: Path) -> tuple[list[Experiment], dict[str, str]]:
    """The experiments that have runs, the newest first, and the experiment of each run."""
    query = """SELECT r.run_uuid, r.name, e.experiment_id, e.name FROM runs r JOIN experiments e USING (experiment_id)
               WHERE r.lifecycle_stage = 'active' AND e.lifecycle_stage = 'active' ORDER BY r.start_time DESC"""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30.0)) as connection:
            rows = connection.execute(query).fetchall()
    except sqlite3.Error as error:
        raise ReviewError(f"{path} is not an MLflow database that can be read: {error}") from None
    found: dict[str, Experiment] = {}
    for _, name, experiment_id, experiment in rows:
        key = str(experiment_id)
        newest = found.get(key, Experiment(key, experiment, 0, name))
        found[key] = newest._replace(runs=newest.runs + 1)
    return list(found.values()), {run_id: str(experiment_id) for run_id, _, experiment_id, _ in rows}


@contextmanager
def _server(database: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The server as a process group of its own, which SIGINT and SIGTERM to this process end."""
    folder = database.resolve().parent
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder / database.name}"]
    command += ["--artifacts-destination", str(folder / "mlartifacts"), "--uvicorn-opts", "--log-level warning"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_LOGGING_LEVEL": "WARNING"}
    quiet |= {"PYTHONWARNINGS": "ignore"}
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    # Not in the group that the terminal sends Ctrl-C to: mlflow would leave its own child behind, and a traceback.
    server = subprocess.Popen(command, env={**os.environ, **quiet}, start_new_session=True)
    try:
        yield server
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # it is ending
        _end(server)


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers, and wait for them. Nobody may be there to reap a worker: a zombie has ended."""
    with suppress(psutil.NoSuchProcess):
        workers = psutil.Process(server.pid).children(recursive=True)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(server.pid, number)
            end = time.monotonic() + _END_SECONDS
            while time.monotonic() < end:
                if server.poll() is not None and not any(map(_is_alive, workers)):
                    return
                time.sleep(0.05)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    """Raises ReviewError when it ends before, or takes too long."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise ReviewError(f"MLflow's server did not start, code {server.returncode}: what it said is above")
        with suppress(OSError, http.client.HTTPException), closing(_connection(port)) as connection:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise ReviewError(f"MLflow's server has not answered for {_START_SECONDS:.0f} s")


def _connection(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)  # no proxy of the environment's
