"""A run on streams, by the real launcher on two ranks: killed, continued, and the weights of the undisturbed one."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.datasets import Datasets
from tests.support.processes import wait_for
from tests.support.runs import ROOT, launch, launch_environment, small_run
from tests.support.streams import UNCOUNTED, Tars, write_tars


@pytest.fixture(scope="module")
def tars(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Tars:
    return write_tars(datasets, tmp_path_factory.mktemp("killed") / "tars")


def test_two_ranks_are_killed_and_end_with_the_undisturbed_weights(
    datasets: Datasets, tars: Tars, tmp_path: Path
) -> None:
    val = f"data.stream_val=pipe:cat {datasets.in22k}/val-000000.tar"
    options = tars.options(UNCOUNTED, val, "data.shuffle_lanes=2", "data.stream_shuffle_samples=20")
    options += ["augment.where=device", "data.workers_per_rank=1", "checkpoint.every_steps=4"]
    done = launch(*small_run(datasets, tmp_path, *options, "name=whole"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "val" in done.stdout

    arguments = small_run(datasets, tmp_path, *options, "name=killed")
    environment = launch_environment(2)
    first = subprocess.Popen(
        [str(ROOT / "launch" / "deepspeed.sh"), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    steps = tmp_path / "killed" / "checkpoints"
    wait_for(lambda: any(steps.glob("step-*")), first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = launch(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"stream: \d+ samples are read once more, by all lanes, to go on at step \d+", done.stdout)
    weights, accuracies = [], []
    for name in ("whole", "killed"):
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        accuracies.append([line["top1"] for line in lines if "top1" in line])
        newest = sorted((tmp_path / name / "checkpoints").glob("step-*"))[-1]
        weights.append({**load_file(newest / "model.safetensors"), **load_file(newest / "ema.safetensors")})
    assert accuracies[0] == accuracies[1] != []
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
