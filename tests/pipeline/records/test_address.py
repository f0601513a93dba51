"""Addresses of MLflow: what can never work is refused before a start, what is away is not; databases made at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest

from pipeline.config.load import Config, load
from pipeline.config.sections import ConfigError
from pipeline.records.address import check_address, database_file, make_database, probe, tracking_uri
from pipeline.records.tracking import Tracker
from tests.support.datasets import Datasets
from tests.support.postgres import running_postgres
from tests.support.processes import PATIENCE_SECONDS
from tests.support.runs import ROOT, run_module, small_run


@pytest.fixture(autouse=True)
def no_address_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


def at(uri: str, root: Path = Path("runs")) -> Config:
    return load("configs/demo_pretrain.yaml", [f"tracking.uri={uri}", f"output_root={root}"])


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("localhost:5000", r"localhost:5000 is a folder to MLflow, .*: set tracking\.uri=http://localhost:5000$"),
        ("./mlruns", r"no longer keeps runs in folders: set tracking\.uri=sqlite:////folder/mlflow\.db or http://"),
        ("file:///somewhere/mlruns", "no longer keeps runs in folders"),
        ("foo://bob:secret@host", r"foo://host: MLflow knows no foo://; it takes http, https, sqlite, postgresql"),
        ("http://", "names no host"),
        ("mssql://bob:secret@host/db", r"mssql://host/db: the database's driver pyodbc is not installed"),
        ("postgresql+nothing://bob:secret@host/db", r"postgresql\+nothing://host/db: .*nothing"),
        ("sqlite://", "keeps nothing: name a file"),
        ("sqlite:///:memory:", "keeps nothing: name a file"),
        (f"sqlite:///{ROOT}/README.md", r"README\.md is no SQLite database"),
        (f"sqlite:///{ROOT}/README.md/mlflow.db", r"README\.md is not a folder"),
        (f"sqlite:///{ROOT}/tests", "tests is a folder, name a file in it"),
    ],
)
def test_addresses_that_can_never_work(uri: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_address(at(uri))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("driver", "scheme", "package"),
    [("psycopg", "postgresql", "psycopg[binary]"), ("psycopg2", "postgresql+psycopg2", "psycopg2-binary")],
)
def test_a_driver_that_is_missing(monkeypatch: pytest.MonkeyPatch, driver: str, scheme: str, package: str) -> None:
    """SQLAlchemy 2.1 takes psycopg 3 where the address names none."""
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(ConfigError, match=f"driver {driver} is not installed: .venv/bin/pip install ") as caught:
        check_address(at(f"{scheme}://bob:secret@host/db"))
    assert f"'{package}', or name another, postgresql+DRIVER://" in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["http://host:5000", "https://bob:secret@host/mlflow", "databricks", "sqlite:///a b.db"]
)
def test_addresses_that_may_work(uri: str) -> None:
    assert check_address(at(uri)) == uri


def test_the_environments_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = load("configs/demo_pretrain.yaml", [f"output_root={tmp_path}"])
    assert tracking_uri(plain) == f"sqlite:///{tmp_path}/mlflow.db"
    assert database_file(tracking_uri(plain)) == tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert tracking_uri(plain) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(plain) == "http://host:5000"
    assert tracking_uri(at("http://other:5000")) == "http://other:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "host:5000")
    with pytest.raises(
        ConfigError, match=r"^MLFLOW_TRACKING_URI host:5000 .*set MLFLOW_TRACKING_URI=http://host:5000$"
    ):
        check_address(plain)


class Answers(BaseHTTPRequestHandler):
    """A server that gives one answer, which `server` holds, and notes who asked."""

    def do_GET(self) -> None:
        code, body = self.server.answer  # type: ignore[attr-defined]
        self.server.asked.append((self.path, self.headers.get("Authorization")))  # type: ignore[attr-defined]
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as found:
        found.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [
        (200, {"experiment": {"lifecycle_stage": "active"}}, None),
        (404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}, None),
        (200, {"experiment": {"lifecycle_stage": "deleted"}}, "experiment 'hornet-demo' at .* was deleted: restore it"),
        (401, "who are you?", "refuses the login .*MLFLOW_TRACKING_USERNAME"),
        (404, "<html>", "is no MLflow server"),
        (200, "<html>", "is no MLflow server"),
        (200, ["?"], "is no MLflow server"),
    ],
)
def test_what_a_server_answers(server: ThreadingHTTPServer, code: int, body: object, words: str | None) -> None:
    server.answer = code, body if isinstance(body, str) else json.dumps(body)  # type: ignore[attr-defined]
    config, notes = at(f"http://bob:s%40cret@127.0.0.1:{server.server_port}/"), list[str]()
    if words is None:
        probe(config, notes.append)
    else:
        with pytest.raises(ConfigError, match=words) as caught:
            probe(config, notes.append)
        assert "cret" not in str(caught.value)
    assert notes == []
    path, login = server.asked[-1]  # type: ignore[attr-defined]
    assert path == "/api/2.0/mlflow/experiments/get-by-name?experiment_name=hornet-demo"
    assert login == "Basic Ym9iOnNAY3JldA=="  # bob:s@cret


def test_a_server_that_is_away_is_no_fault(server: ThreadingHTTPServer) -> None:
    server.answer = 503, "busy"  # type: ignore[attr-defined]
    notes: list[str] = []
    probe(at(f"http://127.0.0.1:{server.server_port}"), notes.append)
    probe(at("http://bob:secret@127.0.0.1:9"), notes.append)
    assert "answers HTTP 503: training starts without, and sends its numbers later" in notes[0]
    assert notes[1].startswith("MLflow at http://127.0.0.1:9 does not answer")


def test_a_deleted_experiment_is_told_before_the_start(datasets: Datasets, tmp_path: Path) -> None:
    """In a real database, by the real check."""
    run = small_run(datasets, tmp_path, f"output_root={tmp_path}")
    assert run_module("pipeline", *run, "--check").returncode == 0
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.delete_experiment(client.create_experiment("hornet-demo"))
    refused = run_module("pipeline", *run, "--check")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "experiment 'hornet-demo' at sqlite:////" in refused.stderr
    assert refused.stderr.endswith("or set another tracking.experiment\n")
    assert run_module("pipeline", *run, "--check", "tracking.experiment=other").returncode == 0


FIRST_RUNS = """
import sys
from pipeline.config.load import load
from pipeline.records.tracking import Tracker
config = load("configs/demo_pretrain.yaml", [f"output_root={sys.argv[1]}", f"name=run-{sys.argv[2]}"])
config.run_dir.mkdir(parents=True)
print("ready", flush=True)
sys.stdin.readline()
with Tracker(config, {}, 0) as tracker:
    tracker.log(1, {"loss": 1.0}, "")
    tracker.finish("FINISHED", [])
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An address where nothing is yet."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/mlflow.db"
        return
    with running_postgres() as uri:
        yield uri


def test_first_runs_of_a_folder_at_once(tmp_path: Path, new_database: str) -> None:
    """Three runs make one database and one experiment, and all are in it."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_RUNS, str(tmp_path), str(number)],
            cwd=ROOT,
            env={**os.environ, "MLFLOW_TRACKING_URI": new_database},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("go\n")
        run.stdin.flush()
    for run in runs:
        _, errors = run.communicate(timeout=PATIENCE_SECONDS)
        assert (run.returncode, errors) == (0, "")
    client = mlflow.MlflowClient(new_database)
    found = client.search_experiments(filter_string="name = 'hornet-demo'")
    assert len(found) == 1
    logged = client.search_runs([found[0].experiment_id])
    assert sorted(run.info.run_name for run in logged) == ["run-0", "run-1", "run-2"]
    assert all(run.data.metrics == {"loss": 1.0} and run.info.status == "FINISHED" for run in logged)
    assert not [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name]


@pytest.mark.parametrize("by_variable", [True, False])
def test_a_new_database_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_variable: bool) -> None:
    """Made where the address says, its artifacts beside it, wherever the process works."""
    uri = f"sqlite:///{tmp_path}/deep/er/mlflow.db"
    more = [] if by_variable else [f"tracking.uri={uri}"]
    if by_variable:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    config = load("configs/demo_pretrain.yaml", [f"output_root={tmp_path}/runs", *more])
    config.run_dir.mkdir(parents=True)
    probe(config, lambda note: pytest.fail(note))
    with Tracker(config, {}, 0) as tracker:
        tracker.log(1, {"loss": 1.0}, "")
        tracker.event(1, "something")
        tracker.finish("FINISHED", [])
    assert tracker.run_id is not None
    run = mlflow.MlflowClient(uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})
    assert str(run.info.artifact_uri).startswith((tmp_path / "deep" / "er" / "mlartifacts").as_uri())
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def test_a_database_that_is_not_finished_is_none(tmp_path: Path) -> None:
    """What fails, or is killed, while the database is being made leaves none: the next run makes it."""

    def fail(uri: str) -> None:
        Path(uri.removeprefix("sqlite:///")).write_text("half")
        raise KeyboardInterrupt

    uri = f"sqlite:///{tmp_path}/deep/mlflow.db"
    with pytest.raises(KeyboardInterrupt):
        make_database(uri, fail)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [".mlflow.db.lock"]
    make_database(uri, lambda temporary: Path(temporary.removeprefix("sqlite:///")).touch())
    assert (tmp_path / "deep" / "mlflow.db").exists()
    make_database(uri, fail)  # there is one
    make_database("http://host:5000", fail)
