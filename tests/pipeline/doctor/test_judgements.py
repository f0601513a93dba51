"""What is made of hosts' reports: whose clock is wrong, which link is slow, what room checkpoints need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import Config, load
from pipeline.doctor import disks, names, network
from pipeline.doctor.report import Finding, differing, lines, named, odd


def told(findings: list[Finding]) -> list[tuple[str, tuple[str, ...]]]:
    return [(each.status, each.hosts) for each in findings]


def test_most_hosts_are_right_and_of_as_many_the_first() -> None:
    assert odd({"a": 1, "b": 2, "c": 2}) == ("a",)
    assert odd({"a": 1, "b": 2}) == ("b",)
    assert odd({"a": [1], "b": [1]}) == ()
    assert differing({"a": 1, "b": 2, "c": 2}) == "2 on b, c; 1 on a"
    assert named(["a", "b", "c", "d", "e", "f"]) == "a, b, c, d and 2 more"
    assert lines([Finding("disk", "warn", "full", "make room", ("a", "b"))]) == ["warning: a, b: disk: full: make room"]


@pytest.mark.parametrize(
    ("offsets", "found"),
    [
        ({"a": (0.0, 0.01), "b": (0.4, 0.01)}, [("pass", ())]),
        ({"a": (0.0, 0.01), "b": (-1.5, 0.01)}, [("warn", ("b",))]),
        ({"a": (0.0, 0.01), "b": (1.5, 0.6)}, [("pass", ())]),  # so slow an answer does not say that much
        ({"a": (0.0, 0.01), "b": (-300, 0.01), "c": (2, 0.1)}, [("warn", ("c",)), ("fail", ("b",))]),
        ({"a": (300, 0.01), "b": (300.1, 0.01)}, [("warn", ())]),  # it is this host's own that is off
    ],
)
def test_clocks(offsets: dict[str, tuple[float, float]], found: list[tuple[str, tuple[str, ...]]]) -> None:
    assert told(names.judge_clocks(offsets)) == found


def of_names(name: str, own: str, **resolved: str) -> dict[str, Any]:
    report = {"name": name, "machine": name, "own": [own] if own else [], "interfaces": [own], "port": None}
    return {"names": report | {"resolved": {host: [address] if address else [] for host, address in resolved.items()}}}


def test_names_mean_the_same_everywhere() -> None:
    a = of_names("a", "10.0.0.1", a="10.0.0.1", b="10.0.0.2")
    assert told(names.judge({"a": a, "b": of_names("b", "10.0.0.2", a="10.0.0.1", b="10.0.0.2")})) == [("pass", ())]
    # Its own name may be loopback nowhere, an entry for another host neither.
    for own in ("127.0.1.1", "", "::1"):
        assert told(names.judge({"a": a, "b": of_names("b", own, a="10.0.0.1", b=own or "10.0.0.2")})) == [
            ("fail", ("b",))
        ]
    assert told(names.judge({"a": a, "b": of_names("b", "10.0.0.2", a="127.0.0.1", b="10.0.0.2")})) == [
        ("fail", ("b",))
    ]
    # Known to ssh alone: ranks do not need it.
    assert told(names.judge({"a": a, "b": of_names("b", "10.0.0.2", a="", b="10.0.0.2")})) == [("warn", ("b",))]


@pytest.mark.parametrize(("gbit", "status"), [(1.0, "pass"), (400.0, "warn"), (0.0, "pass")])
def test_bandwidth_against_the_slowest_link(gbit: float, status: str) -> None:
    """0.5 Gbit/s is fine for a link of 1, and not for any that gloo could fill. Unknown: said, and no more."""
    answer = {"ranks": [{"joined_seconds": 1.0, "seconds": {str(1 << 20): 8 * (1 << 20) / 0.5e9}}]}
    links = {"a": {"ethernet": {"interface": "eth0", "gbit": gbit}, "infiniband": []}}
    links["b"] = {"ethernet": {"interface": "eth0", "gbit": 800.0 if gbit else 0.0}, "infiniband": []}
    (finding,) = network.judge({"a": answer, "b": answer}, links, "gloo", 2)
    assert finding.status == status
    assert "2 ranks, gloo: 0.5 Gbit/s at 1 MiB" in finding.text
    assert (f"eth0 on a: {gbit:g} Gbit/s" if gbit else "is not known") in finding.text


def test_a_rank_that_does_not_come() -> None:
    answers = {"a": {"ranks": [{"error": "timed out"}]}, "b": {"ranks": [{"joined_seconds": 1, "seconds": {}}]}}
    (finding,) = network.judge(answers, {}, "nccl", 2)
    assert (finding.status, finding.hosts, finding.text) == ("fail", ("a",), "timed out")


def of_disks(free: float, checkpoints: int = 0, inodes: int | None = None, size: int | None = None) -> dict[str, Any]:
    place = {"folder": "/runs", "free": free, "total": 1e12, "inodes": inodes}
    lock = {"by": "", "held": False, "alive": False}
    report = {"places": {"output_root": place}, "open_files": [4096, 4096], "locked_memory": 65536, "infiniband": False}
    return {"disks": report | {"lock": lock, "checkpoints": checkpoints, "checkpoint_bytes": size}}


def test_room_for_checkpoints() -> None:
    """Two are kept, and the third is written before the first goes; those that are there already have their room."""
    config: Config = load(Path("configs/demo_pretrain.yaml"))
    assert config.checkpoint.keep_last == 2

    def status(**place: Any) -> list[str]:
        findings = disks.judge({"a": of_disks(size=10**9, **place)}, config)
        return [each.status for each in findings if each.check == "disk"]

    assert status(free=3.1e9) == ["pass"]
    assert status(free=2.9e9) == ["fail"]
    assert status(free=2.9e9, checkpoints=1) == ["pass"]
    assert status(free=0.9e9, checkpoints=5) == ["fail"]
    assert status(free=1e12, inodes=12) == ["fail"]
