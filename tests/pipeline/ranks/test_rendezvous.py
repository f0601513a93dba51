"""All ranks find each other, in processes of their own; who is missing, or cannot be reached, is said by name."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from pipeline.__main__ import _OF_ONE_RANK
from pipeline.ranks import rendezvous
from pipeline.ranks.lifetime import StopRequest, Terminated
from pipeline.ranks.peers import is_lost_peer, named
from pipeline.ranks.rendezvous import Here, RendezvousError, fault_of
from tests.support.processes import PATIENCE_SECONDS, wait_for

CONTEXT = multiprocessing.get_context("spawn")
CONFIG = {"optimizer.lr_peak": 0.004, "name": "a"}


def run_rank(rank: int, ranks: int, port: int, folder: Path, config: dict[str, object], seconds: float) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RENDEZVOUS_SECONDS": str(seconds)}
    os.environ["PIPELINE_HOSTS"] = " ".join(f"node{number + 1}:1" for number in range(ranks))
    stop = StopRequest()
    (folder / f"{rank}.begun").touch()
    try:
        met = rendezvous.meet(config, stop)
        text = f"{met.rank} of {met.count}: {len(met.hosts)}"
        time.sleep(1.0)
    except (RendezvousError, Terminated) as error:
        text = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.said").write_text(text)


def seated(port: int) -> int:
    """How many ranks a meeting has."""
    try:
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        return sum(store.check([f"pipeline/0/here/{rank}"]) for rank in range(3))
    except RuntimeError:
        return 0


class Group:
    """Ranks of one launch; `config` for those that are configured otherwise."""

    def __init__(self, folder: Path, ranks: int, seconds: float = 600.0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.ranks, self.seconds = folder, ranks, seconds
        self.processes: dict[int, multiprocessing.process.BaseProcess] = {}

    def start(self, rank: int, config: dict[str, object] = CONFIG) -> None:
        process = CONTEXT.Process(
            target=run_rank, args=(rank, self.ranks, self.port, self.folder, config, self.seconds), daemon=True
        )
        process.start()
        self.processes[rank] = process

    def said(self) -> dict[int, str]:
        for process in self.processes.values():
            process.join(PATIENCE_SECONDS)
        return {rank: (self.folder / f"{rank}.said").read_text() for rank in self.processes}


def test_they_meet_and_one_that_is_configured_otherwise_is_named(tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    same, other = Group(tmp_path / "same", 3), Group(tmp_path, 2)
    for rank in (2, 1, 0):  # rank 0, which holds the store, comes last
        same.start(rank)
    other.start(0)
    other.start(1, {**CONFIG, "optimizer.lr_peak": 0.001})
    assert same.said() == {rank: f"{rank} of 3: 3" for rank in range(3)}
    said = other.said()
    assert said[0] == said[1]
    assert "rank 1 on " in said[0]
    assert "optimizer.lr_peak = 0.001, not 0.004: start all hosts with one configuration" in said[0]


def test_who_does_not_come_is_named_and_a_request_to_stop_is_everybodys(tmp_path: Path) -> None:
    (tmp_path / "asked").mkdir()
    alone, asked = Group(tmp_path, 3, seconds=8.0), Group(tmp_path / "asked", 3)
    for rank in (0, 1):
        alone.start(rank)
        asked.start(rank)
    wait_for(lambda: all((asked.folder / f"{rank}.begun").exists() for rank in (0, 1)))
    pid = asked.processes[1].pid
    assert pid
    os.kill(pid, signal.SIGUSR1)
    said = alone.said()
    assert said[0] == said[1]
    assert said[0].startswith("RendezvousError: rank 2 on node3 did not come within 8 s")
    assert set(asked.said().values()) == {"Terminated: "}  # and rank 2 has never come


@pytest.mark.parametrize("ranks", [3, 5])
def test_a_rank_that_finds_another_run_leaves_it_alone(tmp_path: Path, ranks: int) -> None:
    """The second run's rank 0 could not listen on the port that is everybody's first, and its others come here."""
    (tmp_path / "second").mkdir()
    first, second = Group(tmp_path, 3), Group(tmp_path / "second", ranks, seconds=5.0)
    for rank in (0, 1):
        first.start(rank)
    wait_for(lambda: seated(first.port) == 2)
    second.port = first.port
    second.start(1, {**CONFIG, "name": "b"})
    (said,) = second.said().values()
    assert said.startswith(
        f"UnmetError: rank 1 on {os.uname().nodename} has found another run at 127.0.0.1:{first.port}"
    )
    first.start(2)
    assert first.said() == {rank: f"{rank} of 3: 3" for rank in range(3)}


def test_what_rank_0_cannot_say_is_said_by_the_first_rank_of_a_host(tmp_path: Path) -> None:
    group = Group(tmp_path, 2, seconds=2.0)
    group.start(1)
    assert group.said()[1].startswith(f"UnmetError: rank 1 on {os.uname().nodename} has not reached rank 0 at ")
    assert "UnmetError" in _OF_ONE_RANK


@pytest.mark.parametrize(
    ("addresses", "gloo", "environment", "named_host"),
    [
        (["10.0.0.1", "10.0.0.2"], True, {}, None),
        (["10.0.0.1", "127.0.1.1"], True, {}, "b"),
        (["127.0.0.1", "10.0.0.2"], True, {}, "a"),
        (["10.0.0.1", None], True, {}, "b"),
        (["10.0.0.1", "127.0.1.1"], False, {}, None),  # NCCL looks for interfaces by itself
        (["10.0.0.1", "127.0.1.1"], True, {"GLOO_SOCKET_IFNAME": "eth0"}, None),
    ],
)
def test_a_host_that_others_cannot_reach(
    addresses: list[str | None], gloo: bool, environment: dict[str, str], named_host: str | None
) -> None:
    ranks = [Here(host, address, CONFIG) for host, address in zip("ab", addresses, strict=True)]
    fault = fault_of(ranks, gloo, environment)
    assert (fault is None) == (named_host is None)
    assert fault is None or fault.startswith(f"{named_host} takes its own name for ")
    # On one host they reach each other by the loopback.
    assert fault_of([Here("a", "127.0.1.1", CONFIG)] * 2, gloo, environment) is None


def test_passwords_in_a_configuration_are_not_said() -> None:
    uri = "https://me:swordfish@mlflow.example"
    ranks = [Here("a", None, {"tracking.uri": uri}), Here("b", None, {"tracking.uri": None})]
    for both in (ranks, ranks[::-1]):
        assert "tracking.uri" in str(fault_of(both, True, {}))
        assert "swordfish" not in str(fault_of(both, True, {}))


def test_ranks_in_words() -> None:
    hosts = [f"node{rank // 2}" for rank in range(12)]
    assert named([3], hosts) == "rank 3 on node1"
    assert named([5, 4], hosts) == "ranks 4, 5 on node2"
    assert named(range(12), hosts) == "ranks 0, 1, 2, 3 and 8 more on node0, node1, node2, node3 and 2 more hosts"
    assert named([1]) == "rank 1"


@pytest.mark.parametrize(
    "text",
    [  # gloo's, torch 2.15, seen on hosts that were cut off or killed
        "[pair.cc:547] Connection closed by peer [10.0.0.2]:1",
        "Read error [10.0.0.2]:45678: Connection timed out",
        "writev [10.0.0.2]:45678: No route to host",
        "Gloo connectFullMesh failed with [pair.cc:144] connect [10.0.0.2]:45678: Connection refused",
        # NCCL's documentation
        "NCCL error: remote process exited or there was a network error",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ],
)
def test_what_a_collective_says_of_a_lost_rank(text: str) -> None:
    assert is_lost_peer(RuntimeError(text))
    assert not is_lost_peer(ValueError(text))
    assert not is_lost_peer(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))


def test_rank_0_is_asked_before_the_others_have_come(tmp_path: Path) -> None:
    """They would wait for it, for minutes."""
    group = Group(tmp_path, 2)
    group.start(0)
    wait_for(lambda: seated(group.port))
    pid = group.processes[0].pid
    assert pid
    os.kill(pid, signal.SIGTERM)
    time.sleep(3.0)
    group.start(1)
    assert set(group.said().values()) == {"Terminated: "}
