"""Runs on several hosts of this machine (cluster.py), by the real launchers: small ones, that can be held at a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from safetensors.torch import load_file

from tests.support.cluster import Cluster
from tests.support.datasets import Datasets
from tests.support.processes import PATIENCE_SECONDS, wait_for
from tests.support.runs import RECORDER, ROOT, log_of, small_run

STEPS, PER_EPOCH, BATCH = 12, 4, 24
STALL_SECONDS = 15.0
SECRET = "swordfish-of-the-tests"


class Job:
    """A launch that is under way on a host."""

    def __init__(self, hosts: Hosts, name: str, process: subprocess.Popen[bytes]) -> None:
        self.hosts, self.name, self.process = hosts, name, process

    def said(self) -> str:
        return (self.hosts.folder / f"{self.name}.out").read_text(errors="replace")

    def wait(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)

    def wait_for_step(self, step: int) -> None:
        """Until it holds in that step (`Hosts.start(hold=...)`), with those before it logged."""
        wait_for(lambda: self.hosts.last_step(self.name) >= step - 1, self.process, self.said)


class Hosts:
    """Three hosts, and the runs on them."""

    def __init__(self, cluster: Cluster, datasets: Datasets, folder: Path) -> None:
        self.cluster, self.datasets, self.folder = cluster, datasets, folder
        self.jobs: list[Job] = []

    def start(
        self,
        name: str,
        hosts: Sequence[str] = ("node1", "node2"),
        *more: str,
        launcher: str = "deepspeed",
        at: str = "node1",
        hold: int | None = None,
        **environment: str,
    ) -> Job:
        """Launch on one rank a host, from `at`. hold: a step before which all ranks wait until `release`. Without the
        look at all hosts, which takes longer than the training: DOCTOR="1" has it.
        """
        record = self.folder / f"{name}.samples"
        record.mkdir(exist_ok=True)
        sizes = (f"train.global_batch={BATCH}", "train.epochs=3", "checkpoint.every_steps=2", "evaluate.every_epochs=3")
        arguments = small_run(
            self.datasets, self.folder, f"name={name}", *sizes, f"guard.stall_seconds={STALL_SECONDS}", *more
        )
        ours = {**os.environ, "VENV": sys.prefix, "PYTHONPATH": str(RECORDER), "RECORD_SAMPLES": str(record)}
        ours |= {"PIPELINE_ENVIRONMENT": "RECORD_SAMPLES HOLD_AT", "MLFLOW_TRACKING_PASSWORD": SECRET, "DOCTOR": "0"}
        ours |= environment
        if hold is not None:
            ours["HOLD_AT"] = f"{hold - 1}:{self.folder / f'{name}.go'}"
        if launcher == "deepspeed":
            ours["HOSTFILE"] = str(self.cluster.hostfile(names=hosts))
        with open(self.folder / f"{name}.out", "ab") as output:
            process = self.cluster.start(
                at,
                ROOT / "launch" / f"{launcher}.sh",
                *arguments,
                environment=ours,
                cwd=ROOT,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )
        self.jobs.append(Job(self, name, process))
        return self.jobs[-1]

    def torchrun(self, name: str, *more: str, of_node_2: Sequence[str] = (), **options: object) -> list[Job]:
        return [
            self.start(
                name,
                (),
                *(of_node_2 if node else ()),
                *more,
                launcher="torchrun",
                at=f"node{node + 1}",
                NODES="2",
                NODE_RANK=str(node),
                MASTER_ADDR="node1",
                RANKS="1",
                **options,  # type: ignore[arg-type]
            )
            for node in (0, 1)
        ]

    def release(self, name: str) -> None:
        (self.folder / f"{name}.go").touch()

    def last_step(self, name: str) -> int:
        try:
            return int(max(line["step"] for line in log_of(self.folder, name)))
        except (OSError, ValueError):
            return 0

    def finish(self, name: str, hosts: Sequence[str] = ("node1", "node2"), **options: str) -> None:
        """The same command again, to the end."""
        self.release(name)
        job = self.start(name, hosts, **options)  # type: ignore[arg-type]
        assert job.wait() == 0, job.said()[-5000:]
        assert f"resumed from {self.folder / name}/checkpoints" in " ".join(job.said().split())
        self.each_sample_once(name)

    def each_sample_once(self, name: str) -> None:
        """In the tries that led to the end, in every epoch."""
        by_step: dict[int, dict[str, list[int]]] = {}
        for path in sorted((self.folder / f"{name}.samples").iterdir(), key=lambda path: int(path.stem.split("-")[0])):
            started, rank = path.stem.split("-")
            for line in (json.loads(text) for text in path.read_text().splitlines() if text.endswith("}")):
                step = by_step.setdefault(line["step"], {})
                step[rank] = line["samples"]
                step["tries"] = sorted({*step.get("tries", []), int(started)})
        for epoch in range(STEPS // PER_EPOCH):
            seen: list[int] = []
            for step in range(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH):
                parts = {rank: samples for rank, samples in by_step[step].items() if rank != "tries"}
                whole = [sample for rank in sorted(parts) for sample in parts[rank]]
                seen += whole[:BATCH] if len(parts) * len(parts["0"]) > BATCH else whole
            assert len(seen) == len(set(seen)) == PER_EPOCH * BATCH, (epoch, len(seen), len(set(seen)))

    def is_as_undisturbed(self, name: str) -> None:
        last = f"checkpoints/step-{STEPS:08d}"
        for file in ("model", "ema", "optimizer"):
            ours, theirs = (
                load_file(self.folder / run / last / f"{file}.safetensors") for run in (name, "undisturbed")
            )
            assert all(ours[key].equal(theirs[key]) for key in theirs), f"{name}: {file} differs"

    def runner(self) -> psutil.Process:
        """The launcher of the run that was started on node1."""
        return next(p for p in self.cluster.processes("node1") if "launch.deepspeed_runner" in p.cmdline())

    def nothing_is_left(self, seconds: float = 60.0) -> None:
        """On any host, of any run."""
        until = time.monotonic() + seconds
        while left := [p for name in self.cluster.names for p in self.cluster.processes(name)]:
            assert time.monotonic() < until, [p.cmdline() for p in left]
            time.sleep(0.2)
