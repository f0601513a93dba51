"""MLflow's server on a run database, until it is ended; says which pages show runs as soon as it answers."""

from __future__ import annotations

import http.client
import json
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

from pipeline.ranks.ports import require_free
from pipeline.records.address import database_file
from pipeline.records.review_address import experiment_address, review_base, run_address

_START_SECONDS = 600.0  # it takes ten; a database of an older MLflow is converted first
_END_SECONDS = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ReviewError(ValueError):
    """There is nothing to review, or no server to do it with."""


class Experiment(NamedTuple):
    """One that has runs. newest: the name of the last that began."""

    id: str
    name: str
    runs: int
    newest: str


class Database(NamedTuple):
    """An MLflow database, and the run that was asked for, if it was one."""

    path: Path
    run_id: str | None


def review(path: Path, port: int) -> None:
    """Serve the runs of the folder `path`, or show one run's folder, on a port of this host, until SIGINT or SIGTERM.

    Raises ReviewError and PortError; nothing is started then.
    """
    database = find_database(path)
    pages = list(_pages(database, review_base(port)))
    require_free("PORT", port, "127.0.0.1")
    print(f"MLflow starts on {database.path} (ten seconds or more)", flush=True)
    try:
        with _server(database.path, port) as server:
            _wait_until_it_answers(server, port)
            print("open in a browser (Ctrl-C here ends it):", *pages, sep="\n  ", flush=True)
            server.wait()
    except KeyboardInterrupt:
        print("MLflow has ended", flush=True)
        return
    raise ReviewError(f"MLflow's server ended by itself, with code {server.returncode}")


def find_database(path: Path) -> Database:
    """The database of a folder of runs, or of a run's folder. Raises ReviewError."""
    if (path / "mlflow.db").is_file():
        return Database(path / "mlflow.db", None)
    known = _known_run(path)
    if known is None:
        if path.is_dir() or path == Path("runs"):
            raise ReviewError(f"{path} has no mlflow.db: no run yet, `make pretrain` first")
        raise ReviewError(f"there is no folder {path}: name a folder of runs, or a run's")
    uri, run_id = known
    if not uri.startswith("sqlite:"):
        raise ReviewError(f"{path} is tracked by {uri}, not by a file here: open that in a browser")
    file, beside = database_file(uri), path.resolve().parent / "mlflow.db"  # the folder may have been moved with it
    for found in filter(None, (file, beside)):
        if found.is_file():
            return Database(found, run_id)
    raise ReviewError(f"{path} is there, and {file}, which its numbers went to, is not")


def _known_run(path: Path) -> tuple[str, str] | None:
    """Where MLflow is, and its run, of a run's folder."""
    try:
        known = json.loads((path / "mlflow_run.json").read_text())
        return known["uri"], known["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _pages(database: Database, base: str) -> Iterator[str]:
    """The address of each experiment that has runs, the newest first; of the run that was asked for, alone."""
    experiments, experiment_of = _read(database.path)
    if not experiments:
        raise ReviewError(f"{database.path} has no run yet: `make pretrain` first")
    if database.run_id is None:
        width = max(len(experiment.name) for experiment in experiments)
        for each in experiments:
            count = f"{each.runs} run{'s' if each.runs > 1 else ''}, newest {each.newest}"
            yield f"{each.name:{width}}  {experiment_address(base, each.id)}  ({count})"
        return
    if database.run_id not in experiment_of:
        raise ReviewError(f"{database.path} has no run {database.run_id}: was it deleted?")
    yield run_address(base, experiment_of[database.run_id], database.run_id)


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
