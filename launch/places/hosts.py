"""The hosts of a run over ssh: what DEEPSPEED_ARGS takes of a hostfile, and whether they can be reached."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple, NoReturn

from launch.places.settings import SettingError, one_line
from pipeline.ranks.hostfile import Hosts

_VARIABLE = re.compile(r"\s*[A-Za-z_]\w*\s*=.*")
_CONNECT_SECONDS = 15


class Options(NamedTuple):
    """Of DEEPSPEED_ARGS: those that choose hosts and slots, and those that say how they are reached."""

    include: str
    exclude: str
    num_nodes: int | None
    num_gpus: int | None
    launcher: str
    ssh_port: str | None
    no_ssh: bool
    no_ssh_check: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingError(f"DEEPSPEED_ARGS: {message}")


def read_options(words: list[str]) -> Options:
    """What DeepSpeed would read; it takes an option by the beginning of its name, too. Raises SettingError."""
    parser = _Parser(add_help=False)
    for names, kind in (
        (("-i", "--include"), str),
        (("-e", "--exclude"), str),
        (("--num_nodes",), int),
        (("--num_gpus", "--num_accelerators"), int),
        (("--launcher",), str),
        (("--launcher_args",), str),  # of the same beginning
        (("--ssh_port",), str),
        (("-H", "--hostfile"), str),
        (("--master_port",), str),
    ):
        parser.add_argument(*names, type=kind)
    parser.add_argument("--no_ssh", action="store_true")
    parser.add_argument("--no_ssh_check", action="store_true")
    found, _ = parser.parse_known_args(words)
    for name, variable in (("hostfile", "HOSTFILE"), ("master_port", "MASTER_PORT")):
        if getattr(found, name) is not None:
            raise SettingError(f"DEEPSPEED_ARGS has --{name}: the variable {variable} says that")
    return Options(
        *(
            found.include or "",
            found.exclude or "",
            found.num_nodes,
            found.num_gpus,
            (found.launcher or "pdsh").lower(),
        ),
        *(found.ssh_port, found.no_ssh, found.no_ssh_check),
    )


def chosen(hosts: Hosts, options: Options) -> Hosts:
    """The hosts and slots that DeepSpeed would start ranks on. Raises SettingError where it would refuse, or take
    another number than it was asked for.
    """
    by_number = options.num_nodes is not None or options.num_gpus is not None
    if bool(options.include) + bool(options.exclude) + by_number > 1:
        raise SettingError("DEEPSPEED_ARGS: --include, --exclude, and --num_nodes with --num_gpus shut each other out")
    if options.include:
        listed = _specified("--include", options.include, hosts)
        hosts = {host: listed[host] or slots for host, slots in hosts.items() if host in listed}
    elif options.exclude:
        listed = _specified("--exclude", options.exclude, hosts)
        # A host that is listed without slots is left out whole.
        gone = {host: slots or hosts[host] for host, slots in listed.items()}
        left = {host: [slot for slot in slots if slot not in gone.get(host, [])] for host, slots in hosts.items()}
        hosts = {host: slots for host, slots in left.items() if slots}
        if not hosts:
            raise SettingError(f"DEEPSPEED_ARGS: --exclude {options.exclude} leaves no host")
    for name, number, there in (
        ("--num_nodes", options.num_nodes, len(hosts)),
        ("--num_gpus", options.num_gpus, min(map(len, hosts.values()))),
    ):
        if number is not None and not 1 <= number <= there:
            what = "hosts" if name == "--num_nodes" else "slots on the smallest host"
            raise SettingError(f"DEEPSPEED_ARGS: {name} {number}, and HOSTFILE has {there} {what}")
    return {host: slots[: options.num_gpus] for host, slots in list(hosts.items())[: options.num_nodes]}


def _specified(option: str, text: str, hosts: Hosts) -> Hosts:
    """NAME[:SLOT,...][@...]: the slots of each host that is named, none for all of them."""
    listed: Hosts = {}
    for part in text.split("@"):
        host, colon, slots = part.partition(":")
        if host not in hosts:
            raise SettingError(f"DEEPSPEED_ARGS: {option} names {host!r}, which HOSTFILE does not")
        numbers = slots.split(",") if colon else []
        for slot in numbers:
            if not (slot.isascii() and slot.isdigit() and int(slot) in hosts[host]):
                raise SettingError(f"DEEPSPEED_ARGS: {option} names slot {slot!r} of {host}, which HOSTFILE does not")
        listed[host] = sorted({*listed.get(host, []), *map(int, numbers)})
    return listed


def check_environment_files(folders: list[Path], name: str = ".deepspeed_env") -> None:
    """Raises SettingError for a line of DeepSpeed's files of environment variables that it would stumble over: each is
    split at its first =, and pasted into the command for every host, comments too.
    """
    for path in (folder / name for folder in folders):
        try:
            lines = path.read_text().splitlines() if path.is_file() else []
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"{path} cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            if not _VARIABLE.fullmatch(line):
                raise SettingError(f"{path}, line {number}: {line!r} is not NAME=value; no empty lines, no comments")


def require_reachable(hosts: Hosts, options: Options) -> None:
    """Raises SettingError where ssh does not reach a host without asking, or what DeepSpeed needs for it is missing."""
    if options.no_ssh:
        return
    if len(hosts) > 1 and options.launcher == "pdsh" and not shutil.which("pdsh"):
        raise SettingError("pdsh is not installed, by which DeepSpeed starts ranks on several hosts: install it here")
    if options.no_ssh_check:
        return
    if not shutil.which("ssh"):
        raise SettingError("ssh is not installed, by which the hosts of HOSTFILE are reached: install it here")
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]
    command += ["-p", options.ssh_port] if options.ssh_port else []
    tries = {
        host: subprocess.Popen(
            [*command, host, "true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in hosts
    }
    failed = {host: one_line(said, "no reason given") for host, said in _errors(tries).items()}
    if failed:
        host, why = next(iter(failed.items()))
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise SettingError(f"HOSTFILE: ssh does not reach {host}{more} without a password: {why}")


def _errors(tries: dict[str, subprocess.Popen[str]]) -> dict[str, str]:
    said = {host: process.communicate()[1] for host, process in tries.items()}
    return {host: text for host, text in said.items() if tries[host].returncode}
