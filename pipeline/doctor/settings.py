"""What the configuration asks of these hosts: a batch that divides, and a place for MLflow that answers."""

from __future__ import annotations

import socket
import urllib.parse
from collections.abc import Mapping

from data_prep.credentials import without_credentials
from pipeline.config.run import RunConfig
from pipeline.config.sections import ConfigError
from pipeline.doctor.report import Finding, Report, Reports, answered, each
from pipeline.records.address import database_file, probe, tracking_uri

_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_CONNECT_SECONDS = 3.0


def judge_batch(config: RunConfig, slots: Mapping[str, int], ranks: int | None) -> list[Finding]:
    """slots: ranks of each host; `ranks` of all, where it is known in another way."""
    number = ranks or sum(slots.values())
    lanes, nodes = config.data.shuffle_lanes, max(1, len(slots))
    if not number:
        return [Finding("batch", "pass", "the number of ranks is not known before the launch (--ranks says it)")]
    try:
        steps = config.train.accumulation_steps(number)
    except ConfigError as error:
        text, _, advice = str(error).partition("; ")
        return [Finding("batch", "fail", text, advice)]
    findings = []
    if lanes > 1 and lanes % nodes and config.data.reader == "indexed":
        text = f"{nodes} hosts share {lanes} lanes unevenly: each reads shards of others too"
        findings.append(Finding("batch", "warn", text, f"a data.shuffle_lanes that {nodes} divides"))
    if len(set(slots.values())) > 1:
        text = f"from {min(slots.values())} to {max(slots.values())} ranks a host: hosts with more of them read more"
        findings.append(Finding("batch", "warn", text, "the same slots= for all hosts"))
    text = f"{number} ranks x {config.train.micro_batch} images x {steps} = {config.train.global_batch}"
    return [*findings, Finding("batch", "pass", text)]


def look_mlflow(config: RunConfig) -> Report:
    """What the run's MLflow says to the host of rank 0. Raises ConfigError where it never will take the run."""
    notes: list[str] = []
    probe(config, notes.append)
    uri = tracking_uri(config)
    parts = urllib.parse.urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    if scheme in _DATABASE_PORTS and parts.hostname:
        try:
            socket.create_connection((parts.hostname, parts.port or _DATABASE_PORTS[scheme]), _CONNECT_SECONDS).close()
        except OSError as error:
            notes.append(f"the database at {without_credentials(uri)} does not answer ({error.strerror or error})")
    kind = "a file" if database_file(uri) is not None else "answers"
    return {"notes": notes, "uri": f"{without_credentials(uri)}: {kind}"}


def judge_mlflow(reports: Reports) -> list[Finding]:
    """Training does not wait for MLflow: one that is silent is a warning."""
    told, findings = answered("MLflow", reports, "mlflow")
    notes = {host: "; ".join(report["notes"]) for host, report in told.items() if report["notes"]}
    findings += each("MLflow", "warn", notes, "start it, or see to address, network and proxies from that host")
    fine = {host: report["uri"] for host, report in told.items() if not report["notes"]}
    return findings or each("MLflow", "pass", fine, "")
