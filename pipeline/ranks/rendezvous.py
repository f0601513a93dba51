"""All ranks find each other, within minutes, before any of them is inside a collective, where it would wait for half an
hour and say nothing.

Each tells the job's store where it is and how it is configured. Rank 0 looks at what they told, and says that they may
begin, or why not.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed import DistError, PrefixStore, Store, TCPStore

from data_prep.credentials import without_credentials
from pipeline.ranks import handover
from pipeline.ranks.collectives import be_alone_without_launcher, local_ranks
from pipeline.ranks.lifetime import StopRequest, Terminated
from pipeline.ranks.log_file import say_at_once
from pipeline.ranks.peers import named

SECONDS_VARIABLE = "RENDEZVOUS_SECONDS"
_SECONDS = 300.0
_PORT_SECONDS = 150.0  # for ranks of the last launch to leave its port, as for the run folder (lifetime.py)
_FIRST_WORD_SECONDS, _WORD_SECONDS = 30.0, 60.0  # between lines that say who is missing
_LOOK_SECONDS = 0.5
_FAREWELL_SECONDS = 10.0  # for the others to read rank 0's word before its store goes
_STOP_SECONDS = 30.0  # for all ranks to come, and hear that the launch was asked to stop
_SHOWN_KEYS = 3


class RendezvousError(ValueError):
    """The ranks cannot begin together. The text names ranks and hosts, and what to change."""


class UnmetError(RendezvousError):
    """What only this rank's host can know: rank 0 is not there, or is not ours. The first rank of a host says it."""


@dataclass(frozen=True)
class Here:
    """What a rank tells of itself. address: what its host's own name means there; None: nothing."""

    host: str
    address: str | None
    config: dict[str, Any]


@dataclass(frozen=True)
class Meeting:
    """All ranks are there: `rank` of `count`, `hosts` by rank. `store` is of this meeting alone."""

    rank: int
    count: int
    hosts: list[str]
    store: Store | None


def meet(config: Mapping[str, Any], stop: StopRequest) -> Meeting:
    """Wait for all ranks of the launch, for RENDEZVOUS_SECONDS (300). `config` has to be the same on all of them.

    Raises RendezvousError, on all ranks that are there, and Terminated where one of them was asked to stop.
    """
    be_alone_without_launcher()
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host = os.uname().nodename
    if count == 1:
        _forget_handover()
        return Meeting(0, 1, [host], None)
    seconds = float(os.environ.get(SECONDS_VARIABLE) or _SECONDS)
    desk = _Desk(rank, count, time.monotonic() + seconds, seconds, stop)
    return desk.meet(Here(host, own_address(host), dict(config)))


def own_address(host: str) -> str | None:
    """The first IP address that this host's own name means on it."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


class _Desk:
    def __init__(self, rank: int, count: int, deadline: float, seconds: float, stop: StopRequest) -> None:
        self.rank, self.count, self.deadline, self.seconds, self.stop = rank, count, deadline, seconds, stop
        self.master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        # torchrun holds the store itself, and keeps it when it restarts ranks.
        self.of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        # Ranks of the last launch, whose launcher was killed, may still hold the port.
        self.port_deadline = min(deadline, time.monotonic() + _PORT_SECONDS)
        self.prefix = f"pipeline/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def meet(self, here: Here) -> Meeting:
        while True:
            self.server = self._connect()
            self.store = PrefixStore(self.prefix, self.server)
            if self._take_seat():
                break
            if time.monotonic() > self.port_deadline:
                self._fail(
                    f"rank {self.rank} on {os.uname().nodename} has found another run at {self.master}: set another "
                    f"MASTER_PORT, on all hosts"
                )
            time.sleep(_LOOK_SECONDS)
        self.store.set(f"here/{self.rank}", json.dumps(asdict(here)))
        hosts = self._receive(here) if self.rank == 0 else self._wait()
        return Meeting(self.rank, self.count, hosts, self.store)

    def _take_seat(self) -> bool:
        """False where the store is another run's, which may train, or end: nothing more is said to it."""
        try:
            size = self.store.compare_set("size", "", str(self.count)).decode()
            return size == str(self.count) and self.store.add(f"seat/{self.rank}", 1) == 1
        except (DistError, RuntimeError):  # it has just ended
            return False

    def _fail(self, text: str) -> NoReturn:
        raise UnmetError(text) if os.environ.get("LOCAL_RANK", "0") == "0" else RendezvousError(text)

    def _connect(self) -> TCPStore:
        address, _, port = self.master.rpartition(":")
        is_master = self.rank == 0 and not self.of_agent
        told = time.monotonic() + _FIRST_WORD_SECONDS
        while True:
            try:
                return TCPStore(
                    address,
                    int(port),
                    self.count,
                    is_master,
                    timeout=timedelta(seconds=max(1.0, min(5.0, self.deadline - time.monotonic()))),
                    wait_for_workers=False,
                    multi_tenant=True,
                )
            except (DistError, RuntimeError) as error:
                if is_master and "listen" in str(error) and time.monotonic() > self.port_deadline:
                    raise RendezvousError(
                        f"rank 0 on {os.uname().nodename} cannot listen on port {port}, which the launcher has chosen "
                        f"(in use?): set another MASTER_PORT"
                    ) from None
            time.sleep(_LOOK_SECONDS)
            self._leave_if_asked(None)
            now = time.monotonic()
            if now > self.deadline:
                self._fail(
                    f"rank {self.rank} on {os.uname().nodename} has not reached rank 0 at {self.master} for "
                    f"{self.seconds:.0f} s: it did not start (see the lines of its host), or a firewall is between"
                )
            if now > told and os.environ.get("LOCAL_RANK", "0") == "0":
                told = now + _WORD_SECONDS
                say_at_once(f"note: {os.uname().nodename} waits for rank 0 at {self.master}")

    def _receive(self, here: Here) -> list[str]:
        """Rank 0: everybody's word, and then one word to all."""
        there = {0: here}
        begun = time.monotonic()
        told = begun + _FIRST_WORD_SECONDS
        while len(there) < self.count:
            for rank in range(self.count):
                if rank not in there and self.store.check([f"here/{rank}"]):
                    there[rank] = Here(**json.loads(self.store.get(f"here/{rank}")))
            missing = [rank for rank in range(self.count) if rank not in there]
            self._leave_if_asked(self.store)
            now = time.monotonic()
            if missing and now > self.deadline:
                self._refuse(
                    f"{named(missing, expected_hosts(self.count))} did not come within {self.seconds:.0f} s: the cause "
                    f"is in the lines of that host; {SECONDS_VARIABLE} sets how long the others wait"
                )
            if missing and now > told:
                told = now + _WORD_SECONDS
                say_at_once(f"note: waiting for {named(missing, expected_hosts(self.count))} ({now - begun:.0f} s)")
            if missing:
                time.sleep(_LOOK_SECONDS)
        fault = fault_of([there[rank] for rank in range(self.count)], _backend_is_gloo(), os.environ)
        if fault:
            self._refuse(fault)
        hosts = [there[rank].host for rank in range(self.count)]
        _forget_handover()
        self.store.set("word", json.dumps({"hosts": hosts}))
        return hosts

    def _wait(self) -> list[str]:
        """Another rank: rank 0's word."""
        while True:
            try:
                if self.store.check(["word"]):
                    word = json.loads(self.store.get("word"))
                    break
                self._leave_if_asked(self.store)
            except (DistError, RuntimeError):
                self._fail(f"rank 0 at {self.master} is gone before all ranks were there: see its message")
            if time.monotonic() > self.deadline + _FAREWELL_SECONDS:
                self._fail(f"rank 0 at {self.master} has not answered for {self.seconds:.0f} s")
            time.sleep(_LOOK_SECONDS)
        self.store.add("read", 1)
        if "fault" in word:
            raise RendezvousError(word["fault"])
        return list(word["hosts"])

    def _refuse(self, fault: str) -> NoReturn:
        """The same fault for all ranks that are there, or still come."""
        self.store.set("word", json.dumps({"fault": fault}))
        there = sum(self.store.check([f"here/{rank}"]) for rank in range(1, self.count))
        self._linger(lambda: self.store.add("read", 0) >= there)
        raise RendezvousError(fault)

    def _leave_if_asked(self, store: Store | None) -> None:
        """All ranks leave where one of them was asked to: with the code of a run that is to be queued again."""
        if store is None:
            return
        if self.stop.requested:
            store.set("stop", self.stop.reason)
        if store.check(["stop"]):
            if self.rank == 0:
                # Those that still import come too, or would wait for a rank 0 that has left.
                self._linger(lambda: self.store.add("left", 0) >= self.count - 1, _STOP_SECONDS)
            else:
                self.store.add("left", 1)
            raise Terminated

    def _linger(self, over: Callable[[], bool], seconds: float = _FAREWELL_SECONDS) -> None:
        until = time.monotonic() + seconds
        while not over() and time.monotonic() < until:
            time.sleep(0.1)


def fault_of(ranks: list[Here], gloo: bool, environment: Mapping[str, str]) -> str | None:
    """Why these cannot begin together: ranks that are configured otherwise, a host that others cannot reach."""
    first = ranks[0]
    for rank, here in enumerate(ranks):
        if here.config != first.config:
            keys = [key for key in first.config if here.config.get(key) != first.config[key]]
            pairs = [f"{key} = {here.config.get(key)!r}, not {first.config[key]!r}" for key in keys[:_SHOWN_KEYS]]
            shown = without_credentials("; ".join(pairs))
            return (
                f"rank {rank} on {here.host} is configured otherwise than rank 0 on {first.host}: {shown}: start all "
                f"hosts with one configuration"
            )
    if gloo and len({here.host for here in ranks}) > 1 and not environment.get("GLOO_SOCKET_IFNAME"):
        for here in ranks:
            if here.address is None or here.address.startswith("127.") or here.address == "::1":
                return (
                    f"{here.host} takes its own name for {here.address or 'no address'}, where other hosts cannot "
                    f"reach it: give {here.host} its address in /etc/hosts there, or set GLOO_SOCKET_IFNAME=eth0, or "
                    f"what that interface is called"
                )
    return None


def expected_hosts(count: int) -> list[str]:
    """The host of each rank as far as the launcher has told; "" where it has not."""
    hosts: list[str] = []
    for word in os.environ.get(handover.HOSTS_VARIABLE, "").split():
        name, _, slots = word.rpartition(":")
        hosts += [name] * int(slots)
    local = local_ranks(count)
    if len(hosts) != count and local < count and count % local == 0:
        hosts = [f"host number {rank // local}" for rank in range(count)]
    return hosts if len(hosts) == count else [""] * count


def _backend_is_gloo() -> bool:
    return not torch.cuda.is_available()


def _forget_handover() -> None:
    """What was handed over is read by now, and may hold passwords."""
    if folder := os.environ.get(handover.VARIABLE):
        handover.remove(Path(folder))
