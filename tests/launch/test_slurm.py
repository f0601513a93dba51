"""launch/slurm.sbatch under a real Slurm: small runs on one node and on two, asked to stop in every way that Slurm has.

What the Slurm of a test does not show: it tracks jobs by proctrack/linuxproc, which signals every process of a step,
the agent and the ranks that it passes signals on to alike. On a cluster (proctrack/cgroup) the agent alone gets them:
test_launchers.py sends them that way. Nor are there GPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.datasets import Datasets
from tests.support.processes import wait_for
from tests.support.runs import log_of, small_run
from tests.support.slurm import Slurm, running_slurm

EPOCHS, STEPS = 15, 90  # enough for Slurm to preempt a run that goes on


class Jobs:
    """Runs as jobs of one Slurm. Each has the folder of its name in `runs`."""

    def __init__(self, slurm: Slurm, datasets: Datasets, runs: Path) -> None:
        self.slurm, self.datasets, self.runs = slurm, datasets, runs

    def submit(self, name: str, *options: str, ranks: int = 1, more: tuple[str, ...] = ()) -> str:
        """Returns the job's number. ranks: of each node."""
        arguments = small_run(self.datasets, self.runs, f"name={name}", f"train.epochs={EPOCHS}", *more)
        sbatch = ["sbatch", "--parsable", "--gpus-per-node=0", "--cpus-per-task=1"]
        environment = f"--export=ALL,RANKS={ranks},VENV={sys.prefix}"
        return self.slurm.ask(*sbatch, environment, *options, "launch/slurm.sbatch", *arguments).strip()

    def steps(self, name: str) -> int:
        """The last step in its log."""
        return int(log_of(self.runs, name)[-1]["step"]) if (self.runs / name / "log.jsonl").exists() else 0

    def logs(self, job: str) -> Path:
        return self.slurm.checkout / f"slurm-{job}"

    def said(self, job: str) -> str:
        return self.logs(job).with_suffix(".log").read_text()

    def reaches(self, job: str, name: str, step: int) -> None:
        def told() -> str:
            return f"{self.slurm.job(job)}\n{self.said(job)}"

        def reached() -> bool:
            assert self.slurm.job(job)["JobState"] == "RUNNING", told()
            return self.steps(name) >= step

        wait_for(reached, told=told)


@pytest.fixture(scope="module")
def jobs(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with running_slurm(tmp_path_factory.mktemp("slurm"), grace_seconds=60) as slurm:
        yield Jobs(slurm, datasets, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(jobs: Jobs) -> dict[str, torch.Tensor]:
    """The weights of a run to the end, on two nodes: a rank of one node would have half as many threads."""
    job = jobs.submit("whole", "--nodes=2")
    ended = jobs.slurm.wait(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), jobs.said(job)
    assert f"\n0: step {STEPS}/{STEPS}" in jobs.said(job)
    of_ranks = {path.name: path.read_text() for path in (jobs.logs(job) / "0").iterdir()}
    assert sorted(of_ranks) == ["rank0.err", "rank0.out", "rank1.err", "rank1.out"]
    assert f"\nstep {STEPS}/{STEPS}" in of_ranks["rank0.out"]
    return weights(jobs, "whole")


def weights(jobs: Jobs, name: str) -> dict[str, torch.Tensor]:
    return load_file(jobs.runs / name / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")


def test_a_job_goes_on_whoever_interrupts_it(jobs: Jobs, undisturbed: dict[str, torch.Tensor]) -> None:
    """On two nodes: near its time limit, asked by hand, preempted, queued again by hand; it ends as the same run."""
    slurm = jobs.slurm
    # Slurm counts in minutes, and may ask one too early: within half of one from the start, whatever the job does then.
    job = jobs.submit("cut", "--nodes=2", "--time=1", "--signal=USR1@40")
    slurm.wait(job, "RUNNING")
    assert slurm.again(job, "TimeLimit=60") == 1

    first = jobs.steps("cut")
    jobs.reaches(job, "cut", first + 2)
    slurm.ask("scancel", "--signal=USR1", job)
    assert slurm.again(job) == 2
    asked = jobs.steps("cut")
    assert first + 2 <= asked < STEPS

    jobs.reaches(job, "cut", asked + 1)
    other = slurm.ask("sbatch", "--parsable", "--partition=high", "--nodelist=n2", "--exclusive", "--wrap=true").strip()
    slurm.wait(other, "COMPLETED")
    assert slurm.again(job) == 3
    preempted = jobs.steps("cut")
    assert asked + 1 <= preempted < STEPS

    wait_for((jobs.logs(job) / "3").exists)
    slurm.ask("scontrol", "requeue", job)  # while its nodes check the configuration
    assert slurm.again(job) == 4
    assert jobs.steps("cut") == preempted

    ended = slurm.wait(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "4"), jobs.said(job)
    assert [line["step"] for line in log_of(jobs.runs, "cut")] == list(range(1, STEPS + 1))
    ours = weights(jobs, "cut")
    assert ours.keys() == undisturbed.keys()
    assert all(torch.equal(ours[key], undisturbed[key]) for key in undisturbed)
    assert "Traceback" not in jobs.said(job)
    assert sorted(path.name for path in jobs.logs(job).iterdir()) == ["0", "1", "2", "3", "4"]
    assert not list(slurm.checkout.glob("**/*requeue*"))


def test_scancel_is_the_end_of_a_job(jobs: Jobs) -> None:
    """Of one node with two ranks: while it checks, while they import, train and save. No trace is left of the question
    whether it goes on.
    """
    slurm, name = jobs.slurm, "cancelled"
    for moment in ("checking", "importing", "training"):
        job = jobs.submit(name, "--nodes=1", ranks=2, more=("checkpoint.every_steps=1",))
        if moment == "checking":
            wait_for((jobs.logs(job) / "0").exists)
        if moment == "importing":
            wait_for((jobs.logs(job) / "0" / "rank0.out").exists)
        if moment == "training":
            slurm.wait(job, "RUNNING")
            jobs.reaches(job, name, 2)
        slurm.ask("scancel", job)
        assert slurm.wait(job, "CANCELLED")["Restarts"] == "0"
        wait_for(lambda: not slurm.processes(), told=lambda: "\n".join(slurm.processes()))
        assert not list(slurm.checkout.glob("**/*requeue*"))
        assert "Traceback" not in jobs.said(job)
    assert (jobs.runs / name / "checkpoints" / "latest").exists()


def test_an_error_is_the_end_of_a_job(jobs: Jobs) -> None:
    job = jobs.submit("broken", "--nodes=2", more=("data.path=/nowhere",))
    ended = jobs.slurm.wait(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0")
    assert "error: " in jobs.said(job)
    assert "/nowhere" in jobs.said(job)
    assert not list(jobs.slurm.checkout.glob("**/*requeue*"))
