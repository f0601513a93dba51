"""The command on this host alone: hostfiles that cannot be meant so, what is printed, what is left out."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.datasets import Datasets
from tests.support.runs import run_module


def doctor(datasets: Datasets, root: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = ("pipeline", "doctor", "configs/demo_pretrain.yaml", f"data.path={datasets.in22k}")
    return run_module(
        *arguments, f"output_root={root}", "train.global_batch=16", "train.micro_batch=4", *more, **environment
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("node1 slots=1\nnode2\n", "line 2: 'node2' is not 'NAME slots=N'"),
        ("node1 slots=1\nnode1 slots=1\n", "line 2: node1 stands there for the second time"),
        ("node1 slots=8\nnode2 slots=0\n", "line 2: slots=0 of node2: it has to be a whole number"),
        ("# nobody\n", "names no host"),
    ],
)
def test_bad_hostfiles(datasets: Datasets, tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "hostfile").write_text(text)
    done = doctor(datasets, tmp_path, "--hostfile", str(tmp_path / "hostfile"), "--json")
    (finding,) = json.loads(done.stdout)["findings"]
    assert (done.returncode, finding["status"], finding["check"]) == (1, "fail", "hostfile")
    assert what in finding["text"]
    assert finding["advice"] == "see launch/hostfile.example"


def test_this_host(datasets: Datasets, tmp_path: Path) -> None:
    done = doctor(datasets, tmp_path / "new" / "runs", "--fast", "--ranks", "2", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 ranks x 4 images x 2 = 16" in done.stdout
    assert "0 fail" in done.stdout
    assert not (tmp_path / "new").exists()


def test_quiet_is_silent_or_lines(datasets: Datasets, tmp_path: Path) -> None:
    done = doctor(datasets, tmp_path, "--fast", "--quiet", "--ranks", "2")
    assert (done.returncode, done.stdout) == (0, "")
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = doctor(datasets, tmp_path, "--fast", "--quiet", "--ranks", "3", MASTER_PORT=port)
    assert (done.returncode, done.stdout) == (1, "")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert errors[0].startswith(f"error: localhost: port: MASTER_PORT={port}: the port is in use on this host")
    assert errors[1].startswith("error: batch: train.global_batch 16 is not divisible by 3 ranks")


def test_data_that_cannot_be_opened_is_one_finding(datasets: Datasets, tmp_path: Path) -> None:
    """The other findings are there still; a wrong key is the one line of every command."""
    done = doctor(datasets, tmp_path, "--fast", "--json", "data.path=nowhere")
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"]) == (1, False)
    (finding,) = [each for each in told["findings"] if each["status"] == "fail"]
    assert (finding["check"], finding["hosts"]) == ("data", ["localhost"])
    assert "nowhere does not exist" in finding["text"]
    done = doctor(datasets, tmp_path, "train.batch=3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: override 'train.batch=3': no key")
    assert len(done.stderr.splitlines()) == 1
