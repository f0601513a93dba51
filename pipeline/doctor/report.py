"""What was found: pass, warn or fail, of which hosts, and what to do; as a table, as lines, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from data_prep.credentials import without_credentials

Status = Literal["pass", "warn", "fail"]
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
_WIDTH = 130  # columns, where there is no terminal
_NAMED = 4  # hosts that a text names one by one
Report = dict[str, Any]  # what one host tells of a topic, or "error": why it does not
Reports = Mapping[str, Report]  # by host, the first host first


@dataclass(frozen=True)
class Finding:
    """One line of the table. hosts: those that it is about; none: all of them."""

    check: str
    status: Status
    text: str
    advice: str = ""
    hosts: tuple[str, ...] = ()


def passing(finding: Finding) -> Finding:
    """A failure that ends by itself where it is of a launch that has just ended, for which the start waits."""
    if finding.status != "fail":
        return finding
    advice = f"the start waits for ranks of the last launch, two minutes and a half; else {finding.advice}"
    return replace(finding, status="warn", advice=advice)


def named(hosts: Sequence[str]) -> str:
    """Hosts in words, cut where there are many."""
    more = f" and {len(hosts) - _NAMED} more" if len(hosts) > _NAMED else ""
    return f"{', '.join(hosts[:_NAMED])}{more}"


def grouped(values: Mapping[str, Any]) -> list[tuple[Any, list[str]]]:
    """Each value and the hosts that have it. What most have comes first; of as many, what the first host has."""
    groups: list[tuple[Any, list[str]]] = []
    for host, value in values.items():
        for other, hosts in groups:
            if other == value:
                hosts.append(host)
                break
        else:
            groups.append((value, [host]))
    return sorted(groups, key=lambda group: -len(group[1]))


def odd(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The hosts that do not have what most have."""
    return tuple(host for _, hosts in grouped(values)[1:] for host in hosts)


def differing(values: Mapping[str, Any]) -> str:
    """In words: "1.0 on a, b; 2.0 on c"."""
    return "; ".join(f"{value} on {named(hosts)}" for value, hosts in grouped(values))


def each(check: str, status: Status, texts: Mapping[str, str], advice: str) -> list[Finding]:
    """A finding for each text, with all the hosts that it is true of."""
    return [Finding(check, status, text, advice, tuple(hosts)) for text, hosts in grouped(texts)]


def answered(check: str, reports: Reports, key: str) -> tuple[dict[str, Report], list[Finding]]:
    """What hosts tell of the topic `key`; a failure for those that could not look at it."""
    told = {host: report[key] for host, report in reports.items() if key in report}
    errors = {host: report["error"] for host, report in told.items() if "error" in report}
    return {host: told[host] for host in told if host not in errors}, each(check, "fail", errors, "")


def failed(findings: Iterable[Finding]) -> bool:
    """Whether a run would."""
    return any(finding.status == "fail" for finding in findings)


def print_table(findings: Sequence[Finding], title: str, seconds: float) -> None:
    """The table, on stdout: as wide as the terminal, or 130 columns."""
    from rich.console import Console  # here: hosts import this file too, and print no table
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), caption=Text(_count(findings, seconds)), show_lines=False)
    for name, ratio in (("check", None), ("", None), ("hosts", 2), ("what", 5), ("what to do", 5)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for finding in findings:
        table.add_row(
            finding.check,
            Text(finding.status, _COLOURS[finding.status]),
            Text(named(finding.hosts) or "all"),
            Text(without_credentials(finding.text)),  # here: over the end of a line nothing finds them any more
            Text(finding.advice),
        )
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)


def _count(findings: Sequence[Finding], seconds: float) -> str:
    numbers = [f"{sum(each.status == status for each in findings)} {status}" for status in _COLOURS]
    return f"{', '.join(numbers)}; {seconds:.1f} s"


def lines(findings: Iterable[Finding]) -> list[str]:
    """A line for each that did not pass, as other commands have them."""
    words = {"warn": "warning", "fail": "error"}
    return [
        f"{words[each.status]}: {f'{named(each.hosts)}: ' if each.hosts else ''}{each.check}: {each.text}"
        f"{f': {each.advice}' if each.advice else ''}"
        for each in findings
        if each.status != "pass"
    ]


def as_json(findings: Sequence[Finding], reports: Reports, seconds: float) -> str:
    """All of it: the findings, and what each host told."""
    told = {
        "ok": not failed(findings),
        "seconds": round(seconds, 2),
        "findings": [asdict(finding) for finding in findings],
        "hosts": reports,
    }
    return json.dumps(told, indent=1)
