"""Names and clocks: hosts that mean the same by a name, a port to meet at, and one time."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from contextlib import suppress
from pathlib import Path

import psutil

from pipeline.doctor.report import Finding, Report, Reports, Status, answered, differing, each, grouped, odd
from pipeline.ranks.ports import PortError, require_free

_NAME_SECONDS = 5.0
_LATE_SECONDS, _WRONG_SECONDS = 1.0, 60.0  # logs in the wrong order; certificates and signed requests fail
_HOSTS_FILE = "give it its address on the network in /etc/hosts there (Debian's installer writes 127.0.1.1)"


def look(hosts: Sequence[str], port: int | None) -> Report:
    """How this host names itself and the others; what is wrong with `port`, where it is the one to meet at."""
    name = socket.gethostname()
    pool = ThreadPoolExecutor(max_workers=32)  # a name server that is silent takes seconds a name
    asked = {each: pool.submit(_addresses, each) for each in (name, *hosts)}
    found: dict[str, list[str]] = {}
    for each_name, future in asked.items():
        with suppress(LateError):
            found[each_name] = future.result(_NAME_SECONDS)
    pool.shutdown(wait=False)
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "name": name,
        "machine": f"{name} {boot.read_text().strip() if boot.exists() else ''}",
        "own": found.get(name, []),
        "meeting": _first_address() if port is not None else None,
        "resolved": {host: found.get(host, []) for host in hosts},
        "interfaces": [
            address.address.partition("%")[0] for each in psutil.net_if_addrs().values() for address in each
        ],
        "port": None if port is None else _port_fault(port),
    }


def _addresses(name: str) -> list[str]:
    """In the order in which programs try them; none where the name is not known."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def _first_address() -> str | None:
    """Where DeepSpeed 0.19.8 lets the ranks meet: the first that `hostname -I` says on the first host."""
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=_NAME_SECONDS, check=False)
        return next(iter(done.stdout.split()), None)
    return None


def _port_fault(port: int) -> str:
    try:
        require_free("MASTER_PORT", port)
    except PortError as error:
        return f"{str(error).rpartition(': ')[0]}{_listener(port)}"
    return ""


def _listener(port: int) -> str:
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" (by process {connection.pid}, {psutil.Process(connection.pid).name()})"
    return ""


def is_loopback(address: str) -> bool:
    """Whether it leads nowhere but to the host that asks."""
    return ipaddress.ip_address(address).is_loopback


def judge(reports: Reports) -> list[Finding]:
    """Names, and the port."""
    told, findings = answered("host names", reports, "names")
    if len(told) > 1:
        findings += _one_host_twice(told) + _own_names(told) + _other_names(told)
        if not findings:
            findings.append(Finding("host names", "pass", "the same addresses everywhere, none of them loopback"))
    ports = {host: report["port"] for host, report in told.items() if report["port"] is not None}
    taken = {host: fault for host, fault in ports.items() if fault}
    findings += each("port", "fail", taken, "end what listens there, or set another MASTER_PORT")
    if ports and not taken:
        findings.append(Finding("port", "pass", "MASTER_PORT is free", hosts=tuple(ports)))
    return findings


def _one_host_twice(told: dict[str, Report]) -> list[Finding]:
    groups: dict[str, list[str]] = {}
    for host, report in told.items():
        groups.setdefault(report["machine"], []).append(host)
    return [
        Finding("host names", "fail", "names of one and the same host", "one line a host in the hostfile", tuple(hosts))
        for hosts in groups.values()
        if len(hosts) > 1
    ]


def _own_names(told: dict[str, Report]) -> list[Finding]:
    """Gloo binds to the address of the host's own name, and tells it to the others."""
    faults = {}
    for host, report in told.items():
        name, own = report["name"], report["own"]
        if not own:
            faults[host] = f"its own name, {name}, has no address there"
        elif is_loopback(own[0]):
            faults[host] = f"its own name, {name}, is {own[0]} there: other hosts cannot connect to its ranks"
        elif own[0] not in report["interfaces"]:
            faults[host] = f"its own name, {name}, is {own[0]} there, which is no address of that host"
    return each("host names", "fail", faults, _HOSTS_FILE)


def _other_names(told: dict[str, Report]) -> list[Finding]:
    findings = []
    for name in next(iter(told.values()))["resolved"]:
        values: dict[str, str] = {}
        for host, report in told.items():
            addresses = report["resolved"][name]
            own = host == name or report["name"] in (name, name.partition(".")[0])
            if own and addresses and is_loopback(addresses[0]):
                continue  # told above, or of no harm
            ipv4 = [address for address in addresses if ":" not in address]
            values[host] = ", ".join(sorted(ipv4 or addresses)) or "no address"
        if hosts := odd(values):
            unknown = all(values[host] == "no address" for host in hosts) or grouped(values)[0][0] == "no address"
            advice = "the same name service or /etc/hosts on all hosts"
            status: Status = "warn" if unknown else "fail"
            findings.append(Finding("host names", status, f"{name} is {differing(values)}", advice, hosts))
    return findings


def judge_clocks(offsets: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """offsets: of each host, seconds that its clock is ahead of this one's, and by how much that may be wrong."""
    if not offsets:
        return []
    # Which clock is right? That of most, this host among them.
    middle = sorted([0.0, *(offset for offset, _ in offsets.values())])[len(offsets) // 2]
    findings = []
    bounds: list[tuple[Status, float, float]] = [
        ("warn", _LATE_SECONDS, _WRONG_SECONDS),
        ("fail", _WRONG_SECONDS, float("inf")),
    ]
    for status, least, most in bounds:
        texts = {}
        for host, (offset, error) in offsets.items():
            ahead = offset - middle
            if least < abs(ahead) - error <= most:
                texts[host] = f"the clock is {_seconds(abs(ahead))} {'ahead' if ahead > 0 else 'behind'}"
        findings += each("clocks", status, texts, "start a time service there (chrony, systemd-timesyncd)")
    if abs(middle) > _LATE_SECONDS:
        text = f"the clock of this host ({os.uname().nodename}) is {_seconds(abs(middle))} off those of the others"
        findings.append(Finding("clocks", "warn", text, "start a time service here"))
    if not findings:
        furthest = max(abs(offset - middle) + error for offset, error in offsets.values())
        findings.append(Finding("clocks", "pass", f"not more than {furthest:.2f} s apart"))
    return findings


def _seconds(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds > 100 else f"{seconds:.1f} s"
