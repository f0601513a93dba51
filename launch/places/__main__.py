"""Where the ranks of a run go: read from the environment by every launcher, before anything else is started.

    python -m launch.places deepspeed|torchrun|slurm|demo

Prints assignments for a shell to `eval`; what cannot be meant so is one line on stderr, and exit code 1. Which
variables there are stands in launch/README.md. Imports nothing that takes time.

    deepspeed, torchrun   ranks (of all hosts), nodes, launch (arguments of the launcher), module (what each rank is)
    slurm                 NODES, MASTER_ADDR, MASTER_PORT, SRUN_CPUS_PER_TASK
    demo                  RANKS
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from launch.places.devices import VARIABLE, listed_gpus, shared_gpu_note, visible_devices
from launch.places.hosts import check_environment_files, chosen, read_options, require_reachable
from launch.places.settings import SettingError, one_line, whole_number
from pipeline.ranks.handover import HOSTS_VARIABLE
from pipeline.ranks.hostfile import Hosts, read_hostfile
from pipeline.ranks.ports import any_free_port, read_port, require_free

CPU_RANKS = 2  # where nothing else is said
DEMO_RANKS = 2  # for which the demo is sized: no more, however many GPUs there are
_TORCHRUN_PORT = _DEEPSPEED_PORT = 29500
_RENDEZVOUS_SECONDS = 300
_PLAIN_PATH = re.compile(r"[\w@+=:,./-]+", re.ASCII)
# Of the `deepspeed` command's options, those that its launcher on one host has: the number of words that follow.
_ON_ONE_HOST = {"--bind_cores_to_rank": 0, "--bind_core_list": 1, "--enable_each_rank_log": 1, "--log_level": 1}
_ON_ONE_HOST |= {"-q": 0, "--quiet": 0}
Environment = Mapping[str, str]


class OneHost(NamedTuple):
    """The ranks of this host.

    devices: one a rank, as CUDA_VISIBLE_DEVICES names them; none: they are on the CPU.
    divided: whether those are MIG devices.
    notes: what may surprise.
    """

    ranks: int
    devices: list[str]
    divided: bool
    notes: list[str]

    @property
    def module(self) -> list[str]:
        """What `python -m` runs as a rank."""
        return ["launch.places.one_device", "pipeline"] if self.divided else ["pipeline"]

    @property
    def exports(self) -> list[str]:
        """What the launcher and its ranks find in their environment."""
        if self.devices:
            return [_assigned(f"export {VARIABLE}", ",".join(self.devices))]
        return [f"export {VARIABLE}=-1 DS_ACCELERATOR=cpu"]  # said, not guessed with a warning in every process


def main(arguments: list[str], environment: Environment) -> int:
    """Print the assignments for one launcher; returns the exit code."""
    if len(arguments) != 1 or arguments[0] not in _LAUNCHERS:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print("\n".join(_LAUNCHERS[arguments[0]](environment)))
    except ValueError as error:  # SettingError, HostfileError, PortError
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def deepspeed(environment: Environment) -> list[str]:
    """For launch/deepspeed.sh: this host, or those of a hostfile. Raises SettingError, PortError."""
    _refuse(environment, "NODES", "launch/torchrun.sh", "1")
    words = _split(environment.get("DEEPSPEED_ARGS", ""))
    whole_number(environment, "RENDEZVOUS_SECONDS")  # each rank reads it
    if environment.get("HOSTFILE"):
        return _many_hosts(environment, Path(environment["HOSTFILE"]), words)
    words = _of_one_host(words)
    here, port = one_host(environment), _port(environment)
    _tell(here.notes)
    if port is not None:
        require_free("MASTER_PORT", port)
    # DeepSpeed gives every rank what stands in here as CUDA_VISIBLE_DEVICES, on the CPU too.
    ids = [int(name) if name.isdigit() else name for name in here.devices] or [-1] * here.ranks
    world = base64.urlsafe_b64encode(json.dumps({"localhost": ids}).encode()).decode()
    launch = ["--world_info", world, "--master_addr", "127.0.0.1", "--master_port", str(port or any_free_port())]
    return [*_common(here.ranks, 1, [*launch, *words], here.module), *here.exports]


def torchrun(environment: Environment) -> list[str]:
    """For launch/torchrun.sh, which is started on each host. Raises SettingError, PortError."""
    _refuse(environment, "HOSTFILE", "launch/deepspeed.sh")
    _refuse(environment, "DEEPSPEED_ARGS", "launch/deepspeed.sh")
    seconds = whole_number(environment, "RENDEZVOUS_SECONDS") or _RENDEZVOUS_SECONDS
    nodes, node = whole_number(environment, "NODES") or 1, whole_number(environment, "NODE_RANK", 0)
    if nodes == 1 and node:
        raise SettingError(f"NODE_RANK={node}, and NODES is not set: how many hosts are there?")
    here, port = one_host(environment), _port(environment)
    launch = ["--nnodes", str(nodes), "--nproc_per_node", str(here.ranks)]
    if nodes > 1:
        if node is None or node >= nodes:
            said = "is not set" if node is None else f"is {node}"
            raise SettingError(f"NODE_RANK {said}: which of the NODES={nodes} hosts is this, 0 to {nodes - 1}?")
        address = environment.get("MASTER_ADDR", "")
        if not address or len(address.split()) != 1:
            raise SettingError(f"MASTER_ADDR={address}: it has to be the name of the first of the NODES={nodes} hosts")
        port = port or _TORCHRUN_PORT
        launch += ["--node_rank", str(node), "--master_addr", address, "--master_port", str(port)]
        launch += ["--rdzv_conf", f"timeout={seconds}"]
    elif port is not None:
        launch += ["--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    else:
        launch.append("--standalone")
    if port is not None and not node:
        require_free("MASTER_PORT", port)
    _tell(here.notes)
    return [*_common(nodes * here.ranks, nodes, launch, here.module), *here.exports]


def slurm(environment: Environment) -> list[str]:
    """For launch/slurm.sbatch: what torchrun.sh is told on each node. Raises SettingError."""
    _refuse(environment, "HOSTFILE", "launch/deepspeed.sh")
    for read_on_each_node in ("RANKS", "RENDEZVOUS_SECONDS"):
        whole_number(environment, read_on_each_node)
    nodes, job = whole_number(environment, "SLURM_JOB_NUM_NODES"), whole_number(environment, "SLURM_JOB_ID")
    if nodes is None or job is None or not environment.get("SLURM_JOB_NODELIST"):
        raise SettingError("SLURM_JOB_ID, SLURM_JOB_NUM_NODES or SLURM_JOB_NODELIST is not set: submit it with sbatch")
    lines = [f"export NODES={nodes} MASTER_PORT={_port(environment) or 20000 + job % 20000}"]
    lines.append(_assigned("export MASTER_ADDR", _first_node(environment["SLURM_JOB_NODELIST"])))
    # srun does not take it from sbatch by itself.
    if cpus := whole_number(environment, "SLURM_CPUS_PER_TASK"):
        lines.append(f"export SRUN_CPUS_PER_TASK={cpus}")
    return lines


def demo(environment: Environment) -> list[str]:
    """RANKS of the demo, which `make` hands to launch/deepspeed.sh: empty where a hostfile says it. `make` asks once
    more before it makes the data: what is wrong is said then. Raises SettingError.
    """
    if environment.get("HOSTFILE"):
        _hosts(environment, Path(environment["HOSTFILE"]))
        return ["RANKS="]
    ranks = one_host(environment).ranks
    return [f"RANKS={ranks if environment.get('RANKS') else min(ranks, DEMO_RANKS)}"]


def one_host(environment: Environment) -> OneHost:
    """The ranks of this host and their devices: as many as are visible, or the first RANKS of them; on the CPU 2, or
    RANKS. Raises SettingError.
    """
    gpus, why_none = listed_gpus()
    devices = visible_devices(environment, gpus, why_none)
    ranks = whole_number(environment, "RANKS")
    names = devices.names[:ranks]
    if devices.names and ranks is not None and ranks != len(names):
        raise SettingError(f"RANKS={ranks}, and {devices.source}: a rank needs one of its own; lower RANKS")
    notes = [*devices.notes, *shared_gpu_note(names, gpus)]
    if len(names) < len(devices.names):
        notes.append(f"RANKS={ranks}, and {devices.source}: the run has {', '.join(names)}")
    return OneHost(ranks or len(names) or CPU_RANKS, names, devices.divided, notes)


def _hosts(environment: Environment, path: Path) -> Hosts:
    if environment.get("RANKS"):
        raise SettingError(
            f"RANKS={environment['RANKS']} beside HOSTFILE={path}, where slots= says how many ranks a host has: leave "
            "out one of the two"
        )
    return read_hostfile(path)


def _many_hosts(environment: Environment, path: Path, words: list[str]) -> list[str]:
    options = read_options(words)
    hosts = chosen(_hosts(environment, path), options)
    port = _port(environment)
    check_environment_files([Path.home(), Path()], environment.get("DS_ENV_FILE", ".deepspeed_env"))
    if environment.get(VARIABLE) is not None:
        _tell([f"{VARIABLE} does not count with HOSTFILE: slots= does"])
    for what, where in (("the checkout", Path.cwd()), ("the environment's python", Path(sys.executable))):
        if not _PLAIN_PATH.fullmatch(str(where)):
            raise SettingError(
                f"{what} is at {str(where)!r}: DeepSpeed puts that path into commands for remote shells as it is; with "
                f"HOSTFILE it may have letters, digits and _@+=:,./- only"
            )
    require_reachable(hosts, options)
    launch = ["--hostfile", str(path.absolute()), *(["--master_port", str(port)] if port else []), *words]
    if not options.no_ssh:
        launch.append("--force_multi")  # or DeepSpeed 0.19.8 starts the ranks of a single host here, wherever it is
    told = " ".join(f"{host.rpartition('@')[2]}:{len(slots)}" for host, slots in hosts.items())
    first = next(iter(hosts)).rpartition("@")[2]
    return [
        *_common(sum(map(len, hosts.values())), len(hosts), launch, ["pipeline"]),
        _assigned(f"export {HOSTS_VARIABLE}", told),
        _assigned("export PIPELINE_MASTER", f"{first}:{port or _DEEPSPEED_PORT}"),
        # Of the hostfile, those that DEEPSPEED_ARGS leaves.
        _assigned("chosen", "".join(f"{host} slots={len(slots)}\n" for host, slots in hosts.items())),
    ]


def _common(ranks: int, nodes: int, launch: list[str], module: list[str]) -> list[str]:
    return [f"ranks={ranks} nodes={nodes}", f"launch=({shlex.join(launch)})", f"module=({shlex.join(module)})"]


def _tell(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _assigned(name: str, value: str) -> str:
    return f"{name}={shlex.quote(value)}"


def _refuse(environment: Environment, name: str, launcher: str, *harmless: str) -> None:
    if environment.get(name, "") not in ("", *harmless):
        raise SettingError(f"{name}={environment[name]} is for {launcher}, and would not count here: unset it")


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SettingError(f"DEEPSPEED_ARGS: {error}") from None


def _of_one_host(words: list[str]) -> list[str]:
    """DEEPSPEED_ARGS, where they are for the launcher of one host. Raises SettingError."""
    rest = list(words)
    while rest:
        name, is_whole, _ = rest.pop(0).partition("=")
        if name not in _ON_ONE_HOST:
            raise SettingError(
                f"DEEPSPEED_ARGS: {name} is not for one host: RANKS, {VARIABLE} and MASTER_PORT say the places; there "
                f"may be {', '.join(_ON_ONE_HOST)}"
            )
        if _ON_ONE_HOST[name] and not is_whole:
            if not rest:
                raise SettingError(f"DEEPSPEED_ARGS: {name} wants a value")
            rest.pop(0)
    return words


def _port(environment: Environment) -> int | None:
    text = environment.get("MASTER_PORT", "")
    return read_port("MASTER_PORT", text) if text else None


def _first_node(nodes: str) -> str:
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except OSError as error:
        raise SettingError(f"scontrol, which knows the nodes of the job, cannot be run: {error.strerror}") from None
    names = done.stdout.split()
    if done.returncode or not names:
        why = one_line(done.stderr, f"exit code {done.returncode}")
        raise SettingError(f"scontrol does not name the nodes of SLURM_JOB_NODELIST={nodes}: {why}")
    return names[0]


_LAUNCHERS: dict[str, Callable[[Environment], list[str]]] = {
    "deepspeed": deepspeed,
    "torchrun": torchrun,
    "slurm": slurm,
    "demo": demo,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
