"""A hostfile: the hosts of a run over ssh, and how many ranks each of them has."""

from __future__ import annotations

import re
from pathlib import Path

SEE = "see launch/hostfile.example"
# What DeepSpeed 0.19.8 reads, and no more: it takes a line by its beginning. pdsh takes commas and brackets for several
# hosts, of which DeepSpeed counts one.
_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\S+)(\s+max_slots=\d+)?")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*")
Hosts = dict[str, list[int]]  # the slots of each, in the order of the file


class HostfileError(ValueError):
    """A hostfile that cannot be meant so; the text names the line."""


def read_hostfile(path: Path) -> Hosts:
    """The hosts of a hostfile. Raises HostfileError, with the line."""
    try:
        lines = path.read_bytes().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise HostfileError(f"HOSTFILE={path} cannot be read: {why}; {SEE}") from None
    hosts: Hosts = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        where, found = f"HOSTFILE={path}, line {number}", _LINE.fullmatch(text)
        if found is None:
            raise HostfileError(f"{where}: {text!r} is not 'NAME slots=N'; {SEE}")
        host, slots = found["host"], found["slots"]
        if not _HOST.fullmatch(host):
            raise HostfileError(f"{where}: {host!r} is not the name of one host; {SEE}")
        if not (slots.isascii() and slots.isdigit() and int(slots) > 0):
            raise HostfileError(f"{where}: slots={slots} of {host}: it has to be a whole number, 1 or more; {SEE}")
        if host in hosts:
            raise HostfileError(f"{where}: {host} stands there for the second time: one line a host; {SEE}")
        hosts[host] = list(range(int(slots)))
    if not hosts:
        raise HostfileError(f"HOSTFILE={path} names no host; {SEE}")
    return hosts
