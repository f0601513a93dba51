"""`python -m pipeline stop`: what it asks, of whom, and what it says where nobody is there to stop."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.ranks import handover, lifetime
from pipeline.ranks.lifetime import ask_to_stop, exclusive, heed_launch, heed_stop_file, holder_of
from tests.support.processes import wait_for


class Request:
    """What a rank would be asked."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.closing = False

    def ask(self, reason: str, then: str = "") -> None:
        self.reasons.append(reason)


def test_where_nothing_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["stop", str(tmp_path / "none")]) == 1
    assert "no run folder" in capfd.readouterr().err
    assert main(["stop", str(tmp_path)]) == 1
    assert f"nothing runs in {tmp_path}" in capfd.readouterr().err
    with exclusive(tmp_path):
        pass  # a lock file that nobody holds
    assert main(["stop", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]


def test_a_run_that_stops_and_one_that_does_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    request = Request()
    (tmp_path / ".stop").write_text("of the last try")
    os.utime(tmp_path / ".stop", (0, 0))
    held, asked = threading.Event(), threading.Event()

    def run() -> None:
        with exclusive(tmp_path):
            heed_stop_file(tmp_path, request)  # type: ignore[arg-type]
            held.set()
            asked.wait(60)
            while not request.reasons:
                time.sleep(0.02)
            request.closing = True
            (tmp_path / "checkpoints" / "step-00000007").mkdir(parents=True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert held.wait(60)
    assert main(["stop", str(tmp_path), "--wait", "0.1"]) == 1
    assert "still runs after 0 s, process " in capfd.readouterr().err
    asked.set()
    assert main(["stop", str(tmp_path)]) == 0
    thread.join()
    assert set(request.reasons) == {"make stop"}
    assert "its newest checkpoint is step-00000007" in capfd.readouterr().out
    assert not (tmp_path / lifetime._STOP_FILE).exists()


def test_a_launcher_stops_its_own_launch_alone_however_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another launch may hold the folder, and this one wait for it."""
    holds, waits = Request(), Request()
    with exclusive(tmp_path):
        heed_stop_file(tmp_path, holds)  # type: ignore[arg-type]
        ask_to_stop(tmp_path, "SIGTERM to the launcher", "second")  # its ranks still import
        monkeypatch.setenv(handover.VARIABLE, str(tmp_path / handover.FOLDER / "second"))
        heed_launch(tmp_path, waits)  # type: ignore[arg-type]
        wait_for(lambda: waits.reasons)
        time.sleep(1.2)  # both have looked
    holds.closing = waits.closing = True
    assert (holds.reasons, waits.reasons) == ([], ["SIGTERM to the launcher"])
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]


def test_what_is_asked_between_the_lock_and_the_first_look_counts(tmp_path: Path) -> None:
    request = Request()
    with exclusive(tmp_path):
        ask_to_stop(tmp_path, "make stop")
        heed_stop_file(tmp_path, request)  # type: ignore[arg-type]
        wait_for(lambda: request.reasons)
    request.closing = True


def test_two_that_look_are_no_writers(tmp_path: Path) -> None:
    with exclusive(tmp_path):
        assert holder_of(tmp_path) == f"process {os.getpid()} on {os.uname().nodename}"
    with open(tmp_path / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert holder_of(tmp_path) is None
