"""Tracking against a real MLflow server: one that is down at first, and a database file."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import pytest

from pipeline.config import Config, load
from pipeline.tracking import Tracker


def configured(root: Path, *more: str) -> Config:
    config = load("configs/demo_pretrain.yaml", [f"output_root={root}", *more])
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return config


def history(uri: str, run_id: str) -> list[tuple[int, float, int]]:
    found = mlflow.MlflowClient(uri).get_metric_history(run_id, "loss")
    return sorted((m.step, m.value, m.timestamp) for m in found)


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/files"),
        ],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return server
        except OSError:
            assert server.poll() is None, "the MLflow server ended"
            time.sleep(0.5)
    raise AssertionError("the MLflow server did not answer for two minutes")


def test_server_that_is_down_at_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training goes on, says so once, and every number arrives later with the time at which it was logged."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    config = configured(tmp_path, f"tracking.uri={uri}")
    tracker = Tracker(config, {"stage": "pretrain"}, first_step=0)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1 / step, "lr": 0.1}, f"step {step}")
    captured = capsys.readouterr()
    assert captured.out == "step 1\nstep 2\nstep 3\n"
    assert captured.err.count("warning: MLflow at") == 1
    logged = [json.loads(line) for line in (config.run_dir / "log.jsonl").read_text().splitlines()]
    server = start_server(tmp_path, port)
    try:
        tracker.finish("FINISHED", [config.run_dir / "log.jsonl"])
        assert tracker.run_id is not None
        found = history(uri, tracker.run_id)
        assert [(step, round(value, 6)) for step, value, _ in found] == [(1, 1.0), (2, 0.5), (3, 0.333333)]
        assert all(abs(stamp / 1000 - line["time"]) < 0.01 for (_, _, stamp), line in zip(found, logged, strict=True))
        client = mlflow.MlflowClient(uri)
        run = client.get_run(tracker.run_id)
        assert (run.info.status, run.data.tags["stage"]) == ("FINISHED", "pretrain")
        assert run.data.params["optimizer.lr_peak"] == str(config.optimizer.lr_peak)
        assert [item.path for item in client.list_artifacts(tracker.run_id)] == ["log.jsonl"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_going_on_with_a_run(tmp_path: Path) -> None:
    """The MLflow run is found again; lines past the checkpoint, and one that was cut, leave log.jsonl."""
    config = configured(tmp_path)
    first = Tracker(config, {}, first_step=0)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)}, "")
    with open(config.run_dir / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    with Tracker(config, {}, first_step=2) as second:
        assert second.run_id == first.run_id
        second.log(3, {"loss": 3.0}, "")
        second.finish("FINISHED", [])
    # Somewhere else, the run is new and gets all there is; from the first step on it is new too.
    other = configured(tmp_path, f"tracking.uri=sqlite:///{tmp_path}/other.db")
    with Tracker(other, {}, first_step=3) as third:
        third.finish("FINISHED", [])
    assert [(step, value) for step, value, _ in history(third.uri, str(third.run_id))] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    steps = [json.loads(line)["step"] for line in (config.run_dir / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    with pytest.raises(ZeroDivisionError), Tracker(config, {}, first_step=0) as fourth:
        raise ZeroDivisionError
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert fourth.run_id not in (None, second.run_id)
    assert client.get_run(fourth.run_id).info.status == "FAILED"
