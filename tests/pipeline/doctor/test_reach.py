"""The process on a host, when who asks is gone and nobody tells it so."""

import json
import subprocess
import sys
import time

import pytest

from pipeline.doctor import reach
from tests.support.processes import PATIENCE_SECONDS
from tests.support.runs import ROOT

SILENT_SECONDS = 2.0
HOST = f"import pipeline.doctor.host as host; host._SILENT_SECONDS = {SILENT_SECONDS}; host.main()"


def test_a_host_that_hears_nothing_any_more_leaves() -> None:
    """Its input does not end where a network is cut: sshd keeps it open for hours."""
    host = subprocess.Popen(
        [sys.executable, "-c", HOST], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert host.stdin is not None
    assert host.stdout is not None
    for _ in range(8):  # as long as there are signs of life
        host.stdin.write("\n")
        host.stdin.flush()
        time.sleep(SILENT_SECONDS / 4)
    host.stdin.write(json.dumps({"question": "clock"}) + "\n")
    host.stdin.flush()
    assert host.stdout.readline().startswith(reach.MARK)
    assert host.wait(PATIENCE_SECONDS) == 0
    host.stdin.close()
    host.stdout.close()


def test_an_agent_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "PING_SECONDS", 0.1)
    with reach.reached(None, None) as agents:
        agent = agents[reach.HERE]
        written: list[str] = []
        write = agent._write
        monkeypatch.setattr(agent, "_write", lambda line: (written.append(line), write(line))[1])
        time.sleep(1.0)
        assert "time" in agent.ask("clock", PATIENCE_SECONDS)
    assert written.count("\n") >= 3
