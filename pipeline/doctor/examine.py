"""The rounds of an examination: reach all hosts, look, let them see each other's files, let them compute together."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.config.load import Config
from pipeline.config.run import RunConfig
from pipeline.doctor import data, disks, gpus, names, network, settings, software
from pipeline.doctor.reach import HERE, Agent, HostError, ask_all, clock_offset
from pipeline.doctor.report import Finding, Report, failed
from pipeline.ranks.environment import travelling
from pipeline.ranks.hostfile import Hosts

_LOOK_SECONDS, _FOLDER_SECONDS, _REDUCE_SECONDS = 40.0, 10.0, 45.0
_DEFAULT_PORT = 29500  # DeepSpeed's


class Examination:
    """agents: of the hosts of a hostfile, or of this one; `findings` and `reports` are there after `run`."""

    def __init__(self, agents: Mapping[str, Agent], hosts: Hosts | None, port: int | None, fast: bool) -> None:
        self._agents, self.hosts, self.port, self.fast = agents, hosts, port, fast
        self.findings: list[Finding] = []
        self.reports: dict[str, Report] = {}

    def run(self, config: RunConfig, ranks: int | None, tell: Callable[[str], None]) -> None:
        """One round after the other, each told to `tell`; hosts that are lost on the way are left out of the next."""
        tell("versions, GPUs, names, data and disks of each host")
        self._look(config)
        agents = {host: agent for host, agent in self._agents.items() if host in self.reports}
        self._judge(config, ranks)
        if not agents:
            return
        tell("the checkpoint folder, from all hosts")
        self._share(agents)
        if not self.fast:
            tell("an all-reduce over all hosts")
            self._reduce(agents)

    @property
    def _first(self) -> str:
        return next(iter(self._agents))

    @property
    def _slots(self) -> dict[str, int]:
        return {host: len(slots) for host, slots in (self.hosts or {}).items()}

    def _look(self, config: RunConfig) -> None:
        agents = self._agents
        offsets: dict[str, tuple[float, float]] = {}
        lost: dict[str, HostError] = {}
        found: dict[str, Report] = {}
        several = self.hosts is not None
        port = self.port or (_DEFAULT_PORT if several else None)
        environment = travelling(os.environ)  # as ranks have it

        def ask(host: str) -> None:
            agent = agents[host]
            first = host == self._first
            try:
                offsets[host] = clock_offset(agent)
                found[host] = agent.ask(
                    "look",
                    _LOOK_SECONDS,
                    config=_whole(config),
                    environment=environment if several else {},
                    hosts=[name.rpartition("@")[2] for name in self._slots],
                    is_first=first,
                    port=port if first else None,
                    fast=self.fast,
                )
            except HostError as error:
                lost[host] = error
                offsets.pop(host, None)

        threads = [threading.Thread(target=ask, args=(host,), daemon=True) for host in agents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.reports = {host: found[host] for host in agents if host in found}
        for host in agents:
            if host in lost:
                self.findings.append(Finding("hosts", "fail", str(lost[host]), lost[host].advice, (host,)))
        if several and not lost:
            self.findings.append(Finding("hosts", "pass", f"{len(agents)} answer over ssh"))
        if several:
            self.findings += names.judge_clocks(offsets)

    def _judge(self, config: RunConfig, ranks: int | None) -> None:
        reports = self.reports
        slots = self._slots
        if not slots:
            count = sum(len(report["gpus"].get("gpus", [])) for report in reports.values())
            batch = settings.judge_batch(config, {HERE: count} if count else {}, ranks)
        else:
            batch = settings.judge_batch(config, slots, ranks)
        self.findings += [
            *names.judge(reports),
            *software.judge(reports),
            *gpus.judge(reports, slots),
            *data.judge(reports),
            *batch,
            *disks.judge(reports, config),
            *settings.judge_mlflow(reports),
        ]

    def _share(self, agents: Mapping[str, Agent]) -> None:
        """Each host writes a file into the run's folder, or what will hold it, as the first host sees that."""
        first = self.reports.get(self._first) or next(iter(self.reports.values()))
        if "places" not in first["disks"]:
            return  # it could not be looked at, and that is said
        folder = first["disks"]["places"]["output_root"]["folder"]
        nonces = {host: secrets.token_hex(8) for host in agents}
        more: dict[str, dict[str, Any]] = {host: {"folder": folder, "nonce": nonces[host]} for host in agents}
        written = _answers(ask_all(agents, "write", _FOLDER_SECONDS, more), "fault")
        there = [nonces[host] for host, fault in written.items() if not fault]
        more = {host: {"folder": folder, "nonces": there} for host in agents}
        seen = ask_all(agents, "unseen", _FOLDER_SECONDS, more)
        ask_all(agents, "remove", _FOLDER_SECONDS, {})
        names_of = {nonce: host for host, nonce in nonces.items()}
        unseen = {
            host: [names_of[nonce] for nonce in told["unseen"]] for host, told in seen.items() if isinstance(told, dict)
        }
        self.findings += disks.judge_shared(folder, written, unseen, bool(there), len(agents) > 1)

    def _reduce(self, agents: Mapping[str, Agent]) -> None:
        gpus_of = {host: len(report["gpus"].get("gpus", [])) for host, report in self.reports.items()}
        on_gpus = all(gpus_of.values())
        counts = {host: (self._slots.get(host) or gpus_of[host]) if on_gpus else 1 for host in agents}
        if on_gpus:
            counts = {host: min(number, gpus_of[host]) for host, number in counts.items()}
        world = sum(counts.values())
        if world < 2:
            return
        bad_names = [
            each for each in self.findings if each.check in ("host names", "hosts", "port") and each.status == "fail"
        ]
        if len(agents) > 1 and failed(bad_names):
            text = "left out: hosts, names or port have to be right first"
            self.findings.append(Finding("all-reduce", "warn", text))
            return
        address = _address(self.reports[next(iter(agents))]) if len(agents) > 1 else "127.0.0.1"
        backend = "nccl" if on_gpus else "gloo"
        port = self.port or (_DEFAULT_PORT if self.hosts else 0) or _free_port()
        firsts = {host: sum(list(counts.values())[:i]) for i, host in enumerate(counts)}
        more = {
            host: {
                "first": firsts[host],
                "count": counts[host],
                "world": world,
                "address": address,
                "port": port,
                "backend": backend,
                "seconds": _REDUCE_SECONDS,
            }
            for host in agents
        }
        answers = {
            host: answer if isinstance(answer, dict) else {"error": str(answer)}
            for host, answer in ask_all(agents, "reduce", _REDUCE_SECONDS + 5, more).items()
        }
        links = {host: self.reports[host]["links"] for host in agents}
        for host, answer in answers.items():
            self.reports[host]["all_reduce"] = answer
        self.findings += network.judge(answers, links, backend, world)


def _answers(answers: Mapping[str, dict[str, Any] | HostError], key: str) -> dict[str, str]:
    return {host: str(told) if isinstance(told, HostError) else told[key] for host, told in answers.items()}


def _address(report: Report) -> str:
    """Where the ranks meet."""
    told = report["names"]
    return str(told.get("meeting") or next(iter(told.get("own", [])), "127.0.0.1"))


def _free_port() -> int:
    from pipeline.ranks.ports import any_free_port

    return any_free_port()


def _whole(config: RunConfig) -> dict[str, Any]:
    """The configuration with what `model_dump` leaves out: passwords in addresses. It goes through a pipe alone."""
    tree = config.model_dump(mode="json")
    path = config.data.path
    tree["data"]["path"] = path if isinstance(path, str) else [{"path": one.path, "weight": one.weight} for one in path]
    if isinstance(config, Config):
        tree["data"]["stream_val"] = config.data.stream_val
    tree["tracking"]["uri"] = config.tracking.uri
    return tree
