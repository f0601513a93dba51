"""Several hosts for real: the demo's configuration over pdsh, OpenMPI and torchrun, on hosts that are network
namespaces of this machine; hosts that are lost, ranks and launchers that are killed, runs that are asked to stop.

An undisturbed run on two hosts (OpenMPI) is what those with as many ranks are compared to, bit by bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.cluster import Cluster, why_not
from tests.support.datasets import Datasets
from tests.support.hosts import SECRET, STALL_SECONDS, Hosts
from tests.support.processes import wait_for
from tests.support.runs import ROOT

reason = why_not()
pytestmark = pytest.mark.skipif(reason is not None and "CI" not in os.environ, reason=str(reason))

# What a remote shell, pdsh or DeepSpeed's own quoting would change.
AWKWARD = 'it\'s lr(1e-3) a&b; cost $5 %n %h "x" `y`'


@pytest.fixture(scope="module")
def all_hosts(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    assert reason is None, reason
    folder = tmp_path_factory.mktemp("hosts")
    with Cluster(3, folder / "cluster") as cluster:
        hosts = Hosts(cluster, datasets, folder / "runs with blanks")
        hosts.folder.mkdir()
        more = "--launcher openmpi --launcher_args '--allow-run-as-root --oversubscribe'"
        job = hosts.start("undisturbed", DEEPSPEED_ARGS=more, DOCTOR="1")
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
    hosts.runner().kill()
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
    (agent,) = (p for p in hosts.cluster.processes("node2") if "launch.torchrun_agent" in p.cmdline())
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
        job = hosts.start("looped", DOCTOR="1")
        assert job.wait() == 1
        assert "error: node2: host names: its own name, node2, is 127.0.1.1 there" in job.said()  # by doctor
        assert "nothing was started" in job.said()
        job = hosts.start("looped")
        assert job.wait() not in (0, 75)
        assert "node2 takes its own name for 127.0.1.1, where other hosts cannot reach it" in job.said()
        assert "Traceback" not in job.said()
