"""run.sh from end to end on a CPU: every part says something; one that fails or hangs stops none after it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.gpu.parts import PARTS
from tests.support.processes import PATIENCE_SECONDS, is_over
from tests.support.runs import ROOT

pytestmark = pytest.mark.timeout(3600)  # a busy machine


def run(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tests" / "gpu" / "run.sh"), *arguments, "--dry-run"],
        env={**os.environ, "PYTHON": python},
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE_SECONDS,
        check=False,
    )


def verdicts(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """By part, of the table at the end."""
    table = done.stdout.partition("## what became of each part")[2]
    return dict(re.findall(r"^\| (\w+) \| ([^|]+?) \| \d+ \|", table, re.MULTILINE))


def rows(folder: Path, mode: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{mode}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["correct", "speed"])
def test_all_parts_run(mode: str, tmp_path: Path) -> None:
    done = run(mode, "--output", str(tmp_path))
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    expected = [part.name for part in PARTS[mode] if not part.only_by_name]
    assert verdicts(done) == dict.fromkeys(expected, "passed"), told
    ends = {"part", "verdict", "seconds"}
    with_rows = {row["part"] for row in rows(tmp_path, mode) if "note" not in row and row.keys() != ends}
    assert with_rows >= set(expected), told
    assert "WRONG" not in done.stdout


def test_what_fails_or_hangs_stops_nothing(tmp_path: Path) -> None:
    """Nor does anything of it stay behind."""
    done = run(
        "correct", "--output", str(tmp_path), "--stand-ins", "--parts", "raises", "hangs", "works", "--seconds", "90"
    )
    assert done.returncode == 1
    found = verdicts(done)
    assert (found["raises"], found["works"]) == ("FAILED", "passed"), done.stdout + done.stderr
    assert found["hangs"].startswith("OUT OF TIME")
    assert "NOT RIGHT: raises, hangs" in done.stdout
    (child,) = [row["child"] for row in rows(tmp_path, "correct") if "child" in row]
    assert not psutil.pid_exists(child) or is_over(psutil.Process(child))
    assert {"part": "raises", "note": "failed: RuntimeError: as it was asked to"} in rows(tmp_path, "correct")


def test_unknown_parts_are_refused() -> None:
    done = run("speed", "--parts", "depthwise", "golden")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--parts golden: speed has depthwise" in done.stderr


def test_an_interpreter_without_torch_is_told() -> None:
    for python in ("/bin/false", "/is/not/there"):
        done = run("correct", python=python)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"error: {python} is not there, or has no torch: name one that has it: PYTHON=...\n"
