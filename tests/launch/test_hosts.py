"""Several hosts for real: the demo's configuration over pdsh, OpenMPI and torchrun, on hosts that are network
namespaces of this machine; hosts that are lost, ranks and launchers that are killed, runs that are asked to stop.

An undisturbed run on two hosts (OpenMPI) is what those with as many ranks are compared to, bit by bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from tests.support.cluster import Cluster, why_not
from tests.support.datasets import Datasets
from tests.support.processes import PATIENCE_SECONDS, wait_for
from tests.support.runs import RECORDER, ROOT, log_of, small_run

reason = why_not()
pytestmark = pytest.mark.skipif(reason is not None and "CI" not in os.environ, reason=str(reason))

STEPS, PER_EPOCH, BATCH = 12, 4, 24
STALL_SECONDS = 15.0
# What a remote shell, pdsh or DeepSpeed's own quoting would change.
AWKWARD = 'it\'s lr(1e-3) a&b; cost $5 %n %h "x" `y`'
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
        """Launch on one rank a host, from `at`. hold: a step before which all ranks wait until `release`."""
        record = self.folder / f"{name}.samples"
        record.mkdir(exist_ok=True)
        sizes = (f"train.global_batch={BATCH}", "train.epochs=3", "checkpoint.every_steps=2", "evaluate.every_epochs=3")
        arguments = small_run(
            self.datasets, self.folder, f"name={name}", *sizes, f"guard.stall_seconds={STALL_SECONDS}", *more
        )
        ours = {**os.environ, "VENV": sys.prefix, "PYTHONPATH": str(RECORDER), "RECORD_SAMPLES": str(record)}
        ours |= {"PIPELINE_ENVIRONMENT": "RECORD_SAMPLES HOLD_AT", "MLFLOW_TRACKING_PASSWORD": SECRET, **environment}
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

    def nothing_is_left(self, seconds: float = 60.0) -> None:
        """On any host, of any run."""
        until = time.monotonic() + seconds
        while left := [p for name in self.cluster.names for p in self.cluster.processes(name)]:
            assert time.monotonic() < until, [p.cmdline() for p in left]
            time.sleep(0.2)


@pytest.fixture(scope="module")
def all_hosts(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    assert reason is None, reason
    folder = tmp_path_factory.mktemp("hosts")
    with Cluster(3, folder / "cluster") as cluster:
        hosts = Hosts(cluster, datasets, folder / "runs with blanks")
        hosts.folder.mkdir()
        more = "--launcher openmpi --launcher_args '--allow-run-as-root --oversubscribe'"
        job = hosts.start("undisturbed", DEEPSPEED_ARGS=more)
        assert job.wait() == 0, job.said()[-5000:]
        hosts.each_sample_once("undisturbed")
        yield hosts


@pytest.fixture
def hosts(all_hosts: Hosts) -> Iterator[Hosts]:
    yield all_hosts
    for name in all_hosts.cluster.names:
        all_hosts.cluster.link(name, up=True)
        for process in all_hosts.cluster.processes(name):
            process.kill()
    all_hosts.jobs.clear()


def test_the_launcher_is_killed_the_run_is_stopped_and_ends_as_undisturbed(hosts: Hosts) -> None:
    awkward = f"tracking.experiment={AWKWARD}"
    job = hosts.start("stopped", ("node1", "node2"), awkward, hold=4)
    job.wait_for_step(4)
    assert yaml.safe_load((hosts.folder / "stopped" / "config.yaml").read_text())["tracking"]["experiment"] == AWKWARD
    ranks = [rank for name in ("node1", "node2") for rank in hosts.cluster.ranks(name)]
    assert [rank.environ()["MLFLOW_TRACKING_PASSWORD"] for rank in ranks] == [SECRET, SECRET]
    assert {rank.environ()["OMP_NUM_THREADS"] for rank in ranks} == {os.environ["OMP_NUM_THREADS"]}
    every = [" ".join(p.cmdline()) for name in hosts.cluster.names for p in hosts.cluster.processes(name)]
    assert not [line for line in every if SECRET in line]
    assert not (hosts.folder / "stopped" / ".launch").exists()

    hosts.release("stopped")
    runner(hosts).kill()
    hosts.nothing_is_left(150.0)
    saved = sorted(path.name for path in (hosts.folder / "stopped" / "checkpoints").iterdir())[-1]
    assert saved in ("step-00000004", "step-00000005", "step-00000006")  # nobody was left to hear of it

    (hosts.folder / "stopped.go").unlink()
    job = hosts.start("stopped", ("node1", "node2"), awkward, hold=8)
    job.wait_for_step(8)
    threading_release = subprocess.Popen(["sh", "-c", f"sleep 2; touch '{hosts.folder}/stopped.go'"])
    said = hosts.cluster.run("node2", sys.executable, "-m", "pipeline", "stop", hosts.folder / "stopped", cwd=ROOT)
    threading_release.wait()
    assert "is asked to stop" in said
    assert "its newest checkpoint is step-000000" in said
    assert job.wait() == 75, job.said()[-3000:]
    assert not (hosts.folder / "stopped" / ".stop").exists()

    job = hosts.start("stopped", ("node1", "node2"), awkward)
    assert job.wait() == 0, job.said()[-3000:]
    hosts.each_sample_once("stopped")
    hosts.is_as_undisturbed("stopped")


def runner(hosts: Hosts) -> psutil.Process:
    (found,) = (p for p in hosts.cluster.processes("node1") if "launch/deepspeed_runner.py" in p.cmdline())
    return found


def test_a_host_is_lost_and_the_others_go_on(hosts: Hosts) -> None:
    """Its plug is pulled: no packet says so."""
    job = hosts.start("lost", hosts.cluster.names, hold=6)
    job.wait_for_step(6)
    hosts.cluster.link("node3", up=False)
    cut = time.monotonic()
    hosts.release("lost")
    assert job.wait() not in (0, 75), job.said()
    seconds = time.monotonic() - cut
    assert "rank 2 on node3" in job.said(), job.said()[-3000:]
    hosts.nothing_is_left()  # on the host that was cut off, too
    assert seconds < 12 * STALL_SECONDS
    hosts.finish("lost", ["node1", "node2"])


def test_the_ranks_of_a_host_are_killed_and_the_last_host_goes_on(hosts: Hosts) -> None:
    """It is another one than where the command is given: DeepSpeed would train there."""
    job = hosts.start("killed", hold=6)
    job.wait_for_step(6)
    for rank in hosts.cluster.ranks("node1"):
        rank.kill()
    hosts.release("killed")
    assert job.wait() not in (0, 75)
    assert "on node1" in job.said().rpartition("error: ")[2]
    hosts.nothing_is_left()
    hosts.finish("killed", ["node2"])
    summary = job.said()
    assert "node2: step 12/12" in summary.replace("step  ", "step ")
    hosts.nothing_is_left()


def test_torchrun_on_two_hosts(hosts: Hosts) -> None:
    jobs = hosts.torchrun("turned", of_node_2=["optimizer.lr_peak=0.001"])
    assert [job.wait() for job in jobs] == [1, 1]
    (line,) = {line for line in jobs[0].said().splitlines() if "is configured otherwise" in line}
    assert "rank 1 on node2 is configured otherwise than rank 0 on node1: optimizer.lr_peak = 0.001, not " in line
    assert "Traceback" not in jobs[0].said()

    jobs = hosts.torchrun("turned")
    wait_for(lambda: hosts.cluster.ranks("node2"), jobs[1].process, jobs[1].said)
    (agent,) = (p for p in hosts.cluster.processes("node2") if "launch/torchrun_agent.py" in p.cmdline())
    agent.terminate()  # while the ranks import, or meet: there is nothing to save
    assert [job.wait() for job in jobs] == [75, 75], jobs[0].said()[-3000:]

    jobs = hosts.torchrun("turned")
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].said()[-3000:]
    hosts.is_as_undisturbed("turned")


def test_ranks_that_do_not_come(hosts: Hosts) -> None:
    job = hosts.start("alone", RENDEZVOUS_SECONDS="25")
    wait_for(lambda: hosts.cluster.ranks("node2"), job.process, job.said)
    for rank in hosts.cluster.ranks("node2"):
        rank.kill()
    assert job.wait() not in (0, 75)
    assert "rank 1 on node2 did not come within 25 s" in job.said(), job.said()[-3000:]
    hosts.nothing_is_left()


def test_a_name_that_means_the_loopback(datasets: Datasets, tmp_path: Path) -> None:
    assert reason is None, reason
    with Cluster(2, tmp_path / "cluster", loopback=["node2"]) as cluster:
        hosts = Hosts(cluster, datasets, tmp_path)
        job = hosts.start("looped")
        assert job.wait() not in (0, 75)
        assert "node2 takes its own name for 127.0.1.1, where other hosts cannot reach it" in job.said()
        assert "Traceback" not in job.said()
