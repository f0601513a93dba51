"""`python -m pipeline review --mlflow`: the real server, its addresses, and what is refused before it starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from pipeline.config.load import load
from pipeline.ranks.ports import any_free_port
from pipeline.records.review_address import direct_run_address, experiment_address, review_base, run_address
from pipeline.records.tracking import Tracker
from pipeline.review.mlflow_pages import page_of_run
from tests.support.browser import needs_browser, shown
from tests.support.processes import PATIENCE_SECONDS, is_over, wait_for
from tests.support.runs import ROOT, run_module

NAME = "a-run-to-look-at"
PAGE = re.compile(r"http://127\.0\.0\.1:\d+/\S+")


class Tracked(NamedTuple):
    """A folder of runs with one that our tracker wrote."""

    root: Path
    experiment: str
    run_id: str

    @property
    def run_dir(self) -> Path:
        return self.root / NAME


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    root = tmp_path_factory.mktemp("runs")
    config = load("configs/demo_pretrain.yaml", [f"output_root={root}", f"name={NAME}"])
    config.run_dir.mkdir()
    with Tracker(config, {}, first_step=0) as tracker:
        tracker.log(1, {"loss": 2.5}, "step 1")
        tracker.finish("FINISHED", [])
        assert tracker.run_id is not None
        assert tracker.mlflow.address == run_address(review_base(), "1", tracker.run_id)
        return Tracked(root, config.tracking.experiment, tracker.run_id)


class Review(NamedTuple):
    """The command, under way. said: its standard output up to the last address."""

    process: subprocess.Popen[str]
    said: str

    @property
    def pages(self) -> list[str]:
        return PAGE.findall(self.said)


def begin(*arguments: str) -> Review:
    """Start the command, and wait until it has printed an address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "review", "--mlflow", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    said = ""
    for line in process.stdout:
        said += line
        if PAGE.search(line):
            return Review(process, said)
    raise AssertionError(f"it ended with {process.wait()}: {said}")


def end(review: Review, number: int) -> int:
    review.process.send_signal(number)
    code = review.process.wait(PATIENCE_SECONDS)
    assert review.process.stdout
    review.process.stdout.close()
    return code


@pytest.fixture(scope="module")
def review(tracked: Tracked) -> Iterator[Review]:
    started = begin(str(tracked.root), "--port", str(any_free_port()))
    yield started
    if started.process.poll() is None:
        end(started, signal.SIGTERM)


@needs_browser
def test_the_address_shows_the_run(review: Review, tracked: Tracked) -> None:
    (address,) = review.pages
    page = shown(address, NAME)
    assert "1 matching run" in page
    assert tracked.experiment in page


@needs_browser
def test_the_address_of_a_run_shows_it(review: Review, tracked: Tracked) -> None:
    (address,) = review.pages
    base, _, rest = address.partition("/#/experiments/")
    for page in (run_address(base, rest.partition("/")[0], tracked.run_id), direct_run_address(base, tracked.run_id)):
        assert "loss 2.5" in shown(page, NAME)


@needs_browser
def test_other_addresses_do_not(review: Review) -> None:
    """Where this fails MLflow has changed: review_address.py may have become needless."""
    (address,) = review.pages
    base, _, rest = address.partition("#")
    assert NAME not in shown(base, "Welcome to MLflow")
    assert NAME not in shown(f"{base}#{rest.partition('/runs')[0]}", "Traces 0 No data available")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_with_all_that_it_started(tracked: Tracked, number: int) -> None:
    port = any_free_port()
    review = begin(str(tracked.run_dir), "--port", str(port))
    assert review.pages == [run_address(review_base(port), "1", tracked.run_id)]
    assert f"open in a browser: {(tracked.root / 'review.html').as_uri()}\n" in review.said
    started = psutil.Process(review.process.pid).children(recursive=True)
    assert len(started) > 1
    assert end(review, number) == 0
    wait_for(lambda: all(map(is_over, started)))


@pytest.mark.parametrize("while_it_starts", [True, False])
def test_a_server_that_ends_is_told_of(tracked: Tracked, tmp_path: Path, while_it_starts: bool) -> None:
    """A stand-in for mlflow: leaves at once, or when it has answered."""
    (tmp_path / "mlflow.py").write_text(
        "import http.server, sys\n"
        "class Answer(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        "if sys.argv[-1] == 'starts': sys.exit(3)\n"
        "server = http.server.HTTPServer(('127.0.0.1', int(sys.argv[sys.argv.index('--port') + 1])), Answer)\n"
        "server.handle_request(); sys.exit(3)\n"
        if not while_it_starts
        else "import sys; sys.exit(3)\n"
    )
    done = run_module(
        *("pipeline", "review", "--mlflow", str(tracked.root), "--port", str(any_free_port())), PYTHONPATH=str(tmp_path)
    )
    said = "did not start, code 3" if while_it_starts else "ended by itself, with code 3"
    assert done.returncode == 1
    assert f"error: MLflow's server {said}" in done.stderr
    assert "Traceback" not in done.stderr


def refused(*arguments: str) -> str:
    done = run_module("pipeline", "review", "--mlflow", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line.removeprefix("error: ")


def test_what_there_is_to_review(tracked: Tracked, tmp_path: Path) -> None:
    assert refused(str(tmp_path)).startswith(f"{tmp_path} has no run: `make pretrain` first")
    assert f"there is no folder {tmp_path}/none" in refused(str(tmp_path / "none"))
    copied = tmp_path / NAME
    shutil.copytree(tracked.run_dir, copied)
    (tmp_path / "mlflow.db").write_bytes(b"not a database")
    assert "not an MLflow database that can be read" in refused(str(tmp_path))
    (tmp_path / "mlflow.db").unlink()
    gone = f"sqlite:///{tmp_path}/elsewhere/mlflow.db"
    (copied / "mlflow_run.json").write_text(json.dumps({"uri": gone, "run_id": "x"}))
    assert "elsewhere/mlflow.db, which its numbers went to, is not" in refused(str(copied))
    (copied / "mlflow_run.json").write_text(json.dumps({"uri": "http://tracker:5000", "run_id": "x"}))
    for path in (copied, tmp_path):
        done = run_module("pipeline", "review", "--mlflow", str(path))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("and in MLflow:\n  http://tracker:5000/#/runs/x\n")
    # As it is written before the run is made, where MLflow was not reached until the end.
    (copied / "mlflow_run.json").write_text(json.dumps({"uri": "http://tracker:5000", "run_id": None, "key": "x"}))
    assert page_of_run(copied, 5000) is None
    assert "has no mlflow.db, and no run that MLflow knows" in refused(str(copied))
    (copied / "mlflow_run.json").write_text(json.dumps({"uri": "http://tracker:5000", "run_id": "x"}))
    with_two = refused(str(tmp_path), str(tracked.root))
    assert "these runs are in 2 places of MLflow" in with_two
    (copied / "mlflow_run.json").write_text(json.dumps({"uri": gone, "run_id": "x"}))
    shutil.copy(tracked.root / "mlflow.db", tmp_path)
    assert "has no run x: was it deleted?" in refused(str(copied))


def test_the_port(tracked: Tracked) -> None:
    for port in ("abc", "0", "70000", ""):
        done = run_module("pipeline", "review", str(tracked.root), "--port", port)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.endswith(f"argument --port: PORT={port}: a port is a number from 1 to 65535\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert f"PORT={port}: the port is in use on this host" in refused(str(tracked.root), "--port", port)


def test_addresses() -> None:
    assert review_base() == "http://127.0.0.1:5000"
    assert experiment_address("http://a:1/", "7") == "http://a:1/#/experiments/7/runs?workflowType=machine_learning"
    assert run_address("http://a:1", "7", "b3") == "http://a:1/#/experiments/7/runs/b3?workflowType=machine_learning"


def test_make_hands_on_what_it_is_told() -> None:
    for words, command in (
        ([], "-m pipeline review  --mlflow --port 5000"),
        (["PORT=5001"], "-m pipeline review  --mlflow --port 5001"),
        (["REVIEW=page"], "-m pipeline review   --port 5000"),
        (["RUN=runs/a"], "-m pipeline review runs/a --mlflow --port 5000"),
    ):
        environment = {
            name: value for name, value in os.environ.items() if name not in ("RUN", "PORT", "REVIEW", "MAKEFLAGS")
        }
        done = subprocess.run(
            ["make", "-n", "review", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert command in done.stdout.replace('"', "")
    done = subprocess.run(["make", "review", "REVIEW=no"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "REVIEW=no: it can be page, or left out" in done.stderr
