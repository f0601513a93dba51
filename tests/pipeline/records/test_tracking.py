"""Tracking against a real MLflow server that is down at first, and database files; a full disk; a closed console."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import mlflow
import pytest
from mlflow.server.security_utils import is_allowed_host_header

from pipeline.config.load import Config, load
from pipeline.config.sections import ConfigError
from pipeline.records import mlflow_run
from pipeline.records.address import probe
from pipeline.records.sender import Sender
from pipeline.records.tracking import Tracker
from tests.support.processes import PATIENCE_SECONDS, wait_for


def configured(root: Path, *more: str) -> Config:
    config = load("configs/demo_pretrain.yaml", [f"output_root={root}", *more])
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return config


def steps_logged(config: Config) -> list[float]:
    return [json.loads(line)["step"] for line in (config.run_dir / "log.jsonl").read_text().splitlines()]


def history_of(tracker: Tracker, key: str = "loss") -> list[tuple[int, float, int]]:
    tracker.flush()
    return history(tracker.mlflow.uri, tracker.run_id, key)


def history(uri: str, run_id: str | None, key: str = "loss") -> list[tuple[int, float, int]]:
    assert run_id is not None
    found = mlflow.MlflowClient(uri).get_metric_history(run_id, key)
    return sorted((m.step, m.value, m.timestamp) for m in found)


def start_server(folder: Path, port: int, said: int | IO[bytes] = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/files"),
        ],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=said,
        stderr=said,
        start_new_session=True,
    )

    def answers() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=PATIENCE_SECONDS)
        except OSError:
            return False
        return True

    wait_for(answers, server, lambda: "the MLflow server ended, or does not answer")
    return server


def opened(config: Config, tags: Mapping[str, str] | None = None, first_step: int = 0) -> Tracker:
    """A tracker whose first try to reach MLflow is over: what it logs is sent at once."""
    tracker = Tracker(config, tags or {}, first_step)
    tracker.start()
    assert tracker.run_id is not None or tracker.mlflow.uri.startswith("http")
    return tracker


def test_nothing_waits_for_mlflow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and events that come while MLflow is being reached are sent once, when it is."""
    reached, package = threading.Event(), mlflow_run.package
    monkeypatch.setattr(mlflow_run, "package", lambda: reached.wait(60) and package())
    config = configured(root)
    tracker = Tracker(config, {}, first_step=0)
    tracker.start()
    for step in (1, 2, 3):
        tracker.log(step, {"loss": float(step)}, "")
    tracker.event(3, "LEFT OUT")
    assert steps_logged(config) == [1, 2, 3]
    assert not (config.run_dir / "mlflow_run.json").exists()
    reached.set()
    tracker.finish("FINISHED", [])
    assert [(step, value) for step, value, _ in history_of(tracker)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
    ]
    artifacts = mlflow.MlflowClient(tracker.mlflow.uri).list_artifacts(str(tracker.run_id))
    assert [item.path for item in artifacts] == ["events.txt"]


def test_server_that_is_down_at_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on, says so once, and every number arrives later with the time at which it was logged."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    config = configured(tmp_path, f"tracking.uri={uri}")
    tracker = opened(config, {"stage": "pretrain"})
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1 / step, "lr": 0.1}, f"step {step}")
    tracker.event(3, "something\nhappened")
    tracker.flush()
    tracker.fail_from_thread("nothing to mark yet")
    captured = capsys.readouterr()
    assert captured.out == "step 1\nstep 2\nstep 3\nstep 3  something\nhappened\n"
    assert captured.err.count("warning: MLflow at") == 1
    logged = [json.loads(line) for line in (config.run_dir / "log.jsonl").read_text().splitlines()]
    server = start_server(tmp_path, port)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(PATIENCE_SECONDS)))  # now that it answers
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
        assert [item.path for item in client.list_artifacts(tracker.run_id)] == ["events.txt", "log.jsonl"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_going_on_with_a_run(root: Path) -> None:
    """The MLflow run is found again; lines past the checkpoint, and one that was cut, leave log.jsonl."""
    config = configured(root)
    first = opened(config)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)}, "")
    first.flush()
    with open(config.run_dir / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    with Tracker(config, {}, first_step=2) as second:
        assert second.run_id == first.run_id
        second.log(3, {"loss": 3.0}, "")
        second.finish("FINISHED", [])
    # Somewhere else, the run is new and gets all there is; from the first step on it is new too.
    shutil.copy(root / "mlflow.db", root / "other.db")
    other = configured(root, f"tracking.uri=sqlite:///{root}/other.db")
    with Tracker(other, {}, first_step=3) as third:
        third.finish("FINISHED", [])
    assert third.run_id != first.run_id
    assert [(step, value) for step, value, _ in history_of(third)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
    ]
    assert steps_logged(config) == [1, 2, 3]
    with pytest.raises(ZeroDivisionError), Tracker(config, {}, first_step=0) as fourth:
        raise ZeroDivisionError("no\nway")
    run = mlflow.MlflowClient(fourth.mlflow.uri).get_run(str(fourth.run_id))
    assert fourth.run_id not in (None, second.run_id)
    assert (run.info.status, run.data.tags["stopped"]) == ("FAILED", "ZeroDivisionError: no way")
    assert "restarts" not in run.data.tags


@pytest.mark.parametrize("how", ["deleted", "another database"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_run_that_is_gone(
    root: Path, database: Path, capsys: pytest.CaptureFixture[str], how: str, when: str
) -> None:
    """A new one takes its place, with every number, and one warning says so."""
    config, client = configured(root), mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    first = opened(config)
    for step in (1, 2):
        first.log(step, {"loss": float(step)}, "")
    first.event(2, "LEFT OUT")
    first.flush()
    gone = str(first.run_id)
    if how == "deleted":
        client.delete_run(gone)
    else:  # the file itself: MLflow holds it open
        with (
            contextlib.closing(sqlite3.connect(root / "mlflow.db")) as now,
            contextlib.closing(sqlite3.connect(database)) as empty,
        ):
            empty.backup(now)
    tracker = opened(config, first_step=2) if when == "before" else first
    tracker.log(3, {"loss": 3.0, "top1": 1.0}, "")
    tracker.flush()
    assert capsys.readouterr().err == (
        f"warning: MLflow at sqlite:///{root}/mlflow.db no longer has the run {gone}: a new one takes its place, with "
        f"every number of {config.run_dir}/log.jsonl\n"
    )
    tracker.finish("FINISHED", [])
    assert tracker.run_id != gone
    assert [(step, value) for step, value, _ in history_of(tracker)] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [(step, value) for step, value, _ in history_of(tracker, "top1")] == [(3, 1.0)]
    assert [item.path for item in client.list_artifacts(str(tracker.run_id))] == ["events.txt"]
    assert client.get_run(str(tracker.run_id)).info.status == "FINISHED"
    assert json.loads((config.run_dir / "mlflow_run.json").read_text())["run_id"] == tracker.run_id


def test_refusals_are_not_called_passing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An experiment deleted under way: what has to be mended is said, not that it is sent again later."""
    config, client = configured(root), mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.create_experiment(config.tracking.experiment)
    client.delete_experiment(experiment)
    tracker = Tracker(config, {}, first_step=0)
    tracker.log(1, {"loss": 1.0}, "")
    assert tracker.run_id is None
    error = capsys.readouterr().err
    assert "once that is mended they are sent, by this run or one that goes on with it" in error
    assert "sent again later" not in error
    client.restore_experiment(experiment)
    tracker.finish("FINISHED", [])
    assert [(step, value) for step, value, _ in history_of(tracker)] == [(1, 1.0)]
    assert capsys.readouterr().err == ""


def test_no_step_stands_twice_in_mlflow(root: Path) -> None:
    """Steps that are run again after a kill are logged again, but MLflow keeps its first values of them."""
    config = configured(root)
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    first = opened(config)
    for step in range(1, 7):
        first.log(step, {"loss": 1 / step}, "")
    first.log(4, {"top1": 40.0}, "")
    before = history_of(first)

    second = opened(config, first_step=2)
    for step in range(3, 9):
        second.log(step, {"loss": 1 / step}, "")
        if step % 4 == 0:
            second.log(step, {"top1": 10.0 * step}, "")
    found = history_of(second)
    assert [step for step, *_ in found] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found[:6] == before
    assert [entry[:2] for entry in history_of(second, "top1")] == [(4, 40.0), (8, 80.0)]
    assert steps_logged(config) == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    second.finish("KILLED", [], reason="SIGUSR1")
    run = client.get_run(str(second.run_id))
    assert (run.info.status, run.data.tags["stopped"], run.data.tags["restarts"]) == ("KILLED", "SIGUSR1", "1")

    # A process that was killed while MLflow was away left lines that MLflow never got: it gets them now.
    with open(config.run_dir / "log.jsonl", "a") as file:
        file.write('{"time": 1.5, "step": 9, "loss": 0.5}\n')
    third = opened(config, first_step=9)
    third.log(10, {"loss": 0.25}, "")
    found = history_of(third)
    assert (len(found), found[8]) == (10, (9, 0.5, 1500))
    run = client.get_run(str(third.run_id))
    assert (run.info.status, run.data.tags["restarts"]) == ("RUNNING", "2")
    assert "stopped" not in run.data.tags


@pytest.fixture
def server_log(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The port of a real server, and the file where it tells of each request."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "server.log"
    with open(log, "wb") as said:
        server = start_server(tmp_path, port, said)
    yield port, log
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_a_real_server(root: Path, server_log: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run asks when it goes on does not grow with what was logged. And the server has to know its name."""
    port, log = server_log
    config = configured(root, f"tracking.uri=http://127.0.0.1:{port}")
    lines = (json.dumps({"time": float(step), "step": step, "loss": 1 / step}) for step in range(1, 1201))
    (config.run_dir / "log.jsonl").write_text("\n".join(lines) + "\n")
    opened(config, first_step=1200).finish("KILLED", [])
    before = len(log.read_text().splitlines())
    second = opened(config, first_step=1100)
    for step in range(1198, 1204):
        second.log(step, {"loss": 1 / step}, "")
    second.finish("FINISHED", [])
    asked = log.read_text().splitlines()[before:]
    assert [line for line in asked if "runs/get?" in line]
    assert not [line for line in asked if "get-history" in line]
    assert [step for step, *_ in history(str(config.tracking.uri), second.run_id)] == list(range(1, 1204))

    resolved = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *more, **named: resolved(host.replace("mlflow.test", "127.0.0.1"), *more, **named),
    )
    named = configured(root, f"tracking.uri=http://bob:secret@mlflow.test:{port}")
    with pytest.raises(ConfigError) as caught:
        probe(named, print)
    assert f"at http://mlflow.test:{port} refuses requests by the name mlflow.test:{port}" in str(caught.value)
    (allowed,) = re.findall("--allowed-hosts '(.*?)'", str(caught.value))
    assert all(is_allowed_host_header(allowed.split(","), f"{name}:{port}") for name in ("mlflow.test", "localhost"))
    assert "secret" not in str(caught.value)
    probe(config, pytest.fail)


def test_a_server_that_is_killed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is logged waits for it; afterwards every number stands there once, as in log.jsonl."""
    monkeypatch.setattr(Sender, "retry_seconds", 0.2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = configured(tmp_path, f"tracking.uri=http://127.0.0.1:{port}")
    step, tracker = 0, None
    for kill in range(3):
        server = start_server(tmp_path, port)
        tracker = tracker or opened(config)
        until = time.monotonic() + random.uniform(0.1, 1.5)
        while time.monotonic() < until:
            step += 1
            tracker.log(step, {"loss": 1 / step, "lr": 0.1 / step}, "")
            time.sleep(0.005)
        if kill < 2:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    try:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(PATIENCE_SECONDS)))
        assert tracker is not None
        tracker.finish("FINISHED", [])
        lines = [json.loads(line) for line in (config.run_dir / "log.jsonl").read_text().splitlines()]
        for key in ("loss", "lr"):
            found = history(str(config.tracking.uri), tracker.run_id, key)
            assert [(at, value) for at, value, _ in found] == [(line["step"], line[key]) for line in lines]
        runs = mlflow.MlflowClient(str(config.tracking.uri)).search_runs(["1"])
        assert [run.info.status for run in runs] == ["FINISHED"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture
def small_disk(tmp_path: Path, database: Path) -> Iterator[Path]:
    """A file system of its own with room for MLflow's database and 400 kB more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = database.stat().st_size + 400_000
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system of a chosen size: {mounted.stderr.decode().strip()}")
    try:
        shutil.copy(database, folder)
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_full_disk(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines wait, whole and in order, and so do MLflow's numbers, until there is room again."""
    config = configured(small_disk)
    tracker = opened(config)
    log = config.run_dir / "log.jsonl"
    tracker.log(1, {"loss": 1.0}, "")
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    metrics = {f"metric_{i}": i / 7 for i in range(7)}  # 170 bytes a line: the last page takes parts of lines too
    for step in range(2, 80):
        tracker.log(step, {"loss": 1 / step, **metrics}, "")
        assert log.read_bytes().endswith(b"}\n")
    tracker.event(79, "in trouble")
    tracker.flush()
    written = steps_logged(config)
    assert written == list(range(1, len(written) + 1))
    assert len(written) < 79
    told = capsys.readouterr().err
    assert told.count("WARNING: ") == 2  # log.jsonl and events.txt, once each
    assert told.count("warning: MLflow") == 1
    assert len(history_of(tracker)) < 79

    filler.unlink()
    tracker.log(80, {"loss": 0.5}, "")
    assert steps_logged(config) == list(range(1, 81))
    tracker.finish("FINISHED", [log])
    assert [step for step, *_ in history_of(tracker)] == list(range(1, 81))
    artifacts = small_disk / "mlartifacts" / str(tracker.run_id) / "artifacts"
    assert (artifacts / "log.jsonl").read_bytes() == log.read_bytes()
    assert (artifacts / "events.txt").read_text().endswith("step 79  in trouble\n")


@pytest.mark.parametrize("gone", ["pipe", "full disk"])
def test_console_that_is_gone(root: Path, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    """The terminal or `tee` ends with the launcher; the log goes on."""
    config = configured(root)
    if gone == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        stdout = os.fdopen(writer, "w")
    else:
        stdout = open("/dev/full", "w")  # noqa: SIM115 (closed below)
    with pytest.raises(OSError, match=r"Broken pipe|No space left"):
        print("it is gone", file=stdout, flush=True)
    monkeypatch.setattr(sys, "stdout", stdout)
    with Tracker(config, {}, first_step=0) as tracker:
        for step in (1, 2):
            tracker.log(step, {"loss": float(step)}, f"step {step}")
        tracker.event(2, "stopped")
        tracker.finish("FINISHED", [])
    assert steps_logged(config) == [1, 2]
    assert len(history_of(tracker)) == 2
    with contextlib.nullcontext() if gone == "pipe" else contextlib.suppress(OSError):
        stdout.close()  # as Python does at its exit


def test_events_of_all_restarts(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(root)
    first = opened(config)
    first.event(3, "LEFT OUT: gradient 1e9")
    second = opened(config, first_step=2)
    second.event(2, "resumed\nwith 2 ranks")
    second.flush()
    assert capsys.readouterr().out == "step 3  LEFT OUT: gradient 1e9\nstep 2  resumed\nwith 2 ranks\n"
    told = ["step 2  resumed with 2 ranks"]  # step 3 is done again, and tells then
    artifact = root / "mlartifacts" / str(second.run_id) / "artifacts" / "events.txt"
    for path in (artifact, config.run_dir / "events.txt"):
        assert [line.split("  ", 1)[1] for line in path.read_text().splitlines()] == told
    Tracker(config, {}, first_step=0)  # from the start again: another MLflow run, whose events these are not
    assert (config.run_dir / "events.txt").read_text() == ""


def test_last_words_while_the_main_thread_hangs(root: Path) -> None:
    config = configured(root)
    tracker = opened(config)
    tracker.log(1, {"loss": 1.0}, "")
    watchdog = threading.Thread(target=tracker.fail_from_thread, args=("no progress for 600 s",))
    watchdog.start()
    watchdog.join()
    client = mlflow.MlflowClient(tracker.mlflow.uri)
    run = client.get_run(str(tracker.run_id))
    assert (run.info.status, run.data.tags["stopped"]) == ("FAILED", "no progress for 600 s")
    client.set_terminated(str(tracker.run_id), "FINISHED")
    tracker.mlflow.uri = "nowhere://"
    tracker.fail_from_thread("MLflow is away")  # and nothing is raised


def test_the_first_end_counts(root: Path) -> None:
    """A run that was asked to stop ends as KILLED, however its process is left then; files that are not there yet are
    left out.
    """
    config = configured(root)
    tracker = opened(config)
    tracker.finish("KILLED", [config.run_dir / "summary.json"], reason="SIGUSR1")
    with pytest.raises(ZeroDivisionError), tracker:
        raise ZeroDivisionError
    run = mlflow.MlflowClient(tracker.mlflow.uri).get_run(str(tracker.run_id))
    assert (run.info.status, run.data.tags["stopped"]) == ("KILLED", "SIGUSR1")
