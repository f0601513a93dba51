"""A user and a password in an address are in nothing that is shown, stored or sent: a whole run, looked through."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import mlflow
import pytest

from data_prep.credentials import without_credentials
from tests.pipeline.records.test_tracking import start_server
from tests.support.datasets import Datasets
from tests.support.runs import ROOT, launch, run_module, small_run
from tests.support.web import web_server

SECRET = "hunter2%40x"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://bob:pw@host:5000/x", "http://host:5000/x"),
        ("postgresql+psycopg2://bob:p@ss@host:5432/db", "postgresql+psycopg2://host:5432/db"),
        ("mysql://bob:pa/ss@host/db", "mysql://host/db"),
        ("https://token@host/x", "https://host/x"),
        ("failed at 'http://u:p@h/a' and (ftp://v:q@i/b)", "failed at 'http://h/a' and (ftp://i/b)"),
        ("https://b/x.tar?X-Amz-Credential=A%2F&X-Amz-Signature=1&n=2", "https://b/x.tar?X-Amz-Credential=***&X-Amz-Signature=***&n=2"),
        ("https://b/x?sv=1&sig=abc%3D", "https://b/x?sv=1&sig=***"),
        ("postgresql://h/db?user=bob&password=pw", "postgresql://h/db?user=***&password=***"),
        ("mssql:///?odbc_connect=DRIVER;UID=bob;PWD=x;SERVER=h", "mssql:///?odbc_connect=DRIVER;UID=***;PWD=***;SERVER=h"),
    ],
)  # fmt: skip
def test_what_is_taken_out(text: str, clean: str) -> None:
    assert without_credentials(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/path@v1",
        "s3://bucket/a:b@c/d",
        "sqlite:////a/b@c/mlflow.db",
        "http://[::1]:5000/a",
        "at http://host:5000: write to somebody@example.com",
        "top1=3, epoch=2; loss=1",
    ],
)
def test_what_stays(text: str) -> None:
    assert without_credentials(text) == text


def test_a_password_apart_from_its_address() -> None:
    text = without_credentials("FATAL: password 'p@ss/1' for bob", "postgresql://bob:p%40ss%2F1@host/db")
    assert text == "FATAL: password '***' for bob"


def test_a_whole_run(datasets: Datasets, tmp_path: Path) -> None:
    """With a password in both addresses: trained to the end, found in MLflow, and the password nowhere."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_server(tmp_path, port)
    with ExitStack() as stack:
        stack.callback(server.wait)
        stack.callback(os.killpg, server.pid, signal.SIGKILL)
        web = stack.enter_context(web_server(datasets.in22k))
        run = small_run(
            *(datasets, tmp_path / "runs", "train.epochs=1", "evaluate.every_epochs=1"),
            f"data.cache_folder={tmp_path}/cache",
        )
        secret = (
            f"data.path={web.replace('//', f'//bob:{SECRET}@')}",
            f"tracking.uri=http://bob:{SECRET}@127.0.0.1:{port}",
        )
        on_the_line = [run_module("pipeline", *run, each, "--check") for each in secret]
        lines = (ROOT / run[1]).read_text()
        lines = lines.replace("  path: data/demo-22k", f"  path: {secret[0].partition('=')[2]}")
        (tmp_path / "run.yaml").write_text(lines.replace("  uri: null", f"  uri: {secret[1].partition('=')[2]}"))
        run = [run[0], str(tmp_path / "run.yaml"), *(each for each in run[2:] if not each.startswith("data.path"))]
        done = launch(*run)
        assert done.returncode == 0, done.stderr
        client = mlflow.MlflowClient(f"http://127.0.0.1:{port}")
        experiment = client.get_experiment_by_name("hornet-demo")
        assert experiment is not None
        (logged,) = client.search_runs([experiment.experiment_id], "tags.stage = 'pretrain'")
        assert logged.data.params["tracking.uri"] == f"http://127.0.0.1:{port}"
        assert logged.data.params["data.path"] == web
    refused = run_module("pipeline", *run, "--check", "data.format=ffcv")
    traced = run_module("pipeline", *run, "--debug", "data.path=nowhere://host/set")
    assert (refused.returncode, traced.returncode) == (1, 1)
    assert "Traceback" in traced.stderr
    printed = run_module("pipeline", *run, "--print-config").stdout
    for each in on_the_line:
        assert each.returncode == 1
        assert "comes with a password on the command line, which `ps`" in each.stderr
    for text in (*(each.stdout + each.stderr for each in (done, refused, traced, *on_the_line)), printed):
        assert "hunter2" not in text, text
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "run.yaml"]
    assert {"server.db", "config.yaml", "checkpoint.json", "mlflow_run.json"} <= {path.name for path in files}
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []
