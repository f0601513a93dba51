"""`python -m pipeline stop`: what it asks, of whom, and what it says where nobody is there to stop."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.ranks import lifetime
from pipeline.ranks.lifetime import exclusive, heed_stop_file


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


def test_a_launcher_asks_its_own_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second launch into the folder, which waits and is told to stop, must not stop the first."""
    first, request = tmp_path / ".launch" / "tmpfirst", Request()
    monkeypatch.setenv("PIPELINE_HANDOVER", str(first))
    heed_stop_file(tmp_path, request)  # type: ignore[arg-type]
    lifetime.ask_to_stop(tmp_path, "SIGTERM to the second", "tmpsecond")
    lifetime.ask_to_stop(tmp_path, "SIGTERM to the first", first.name)
    end = time.monotonic() + 60
    while not request.reasons and time.monotonic() < end:
        time.sleep(0.02)
    request.closing = True
    assert request.reasons == ["SIGTERM to the first"]
