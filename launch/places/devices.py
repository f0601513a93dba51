"""Which GPUs of this host a run is to have: what nvidia-smi lists, and CUDA_VISIBLE_DEVICES as CUDA reads it.

A device goes to the ranks under the name that was given. A UUID does not become a number here: nvidia-smi numbers GPUs
by bus, CUDA the fastest first, unless CUDA_DEVICE_ORDER says otherwise.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from launch.places.settings import SettingError, one_line

VARIABLE = "CUDA_VISIBLE_DEVICES"
_GPU = re.compile(r"GPU (\d+):.*?(?:\(UUID: (GPU-[^)\s]+)\))?\s*")
_MIG = re.compile(r"\s+MIG .*\(UUID: (MIG-[^)\s]+)\)\s*")
_END = re.compile(r"-\d+|NoDevFiles|none", re.IGNORECASE)  # no device: the list ends. Slurm's word for none, and ours
_PATIENCE_SECONDS = 60  # a driver that loads takes some; one that hangs hangs for ever


class Gpu(NamedTuple):
    """A GPU of this host. migs: the UUIDs of the MIG devices that it is divided into."""

    uuid: str
    migs: list[str]


class Devices(NamedTuple):
    """Those that are visible.

    names: as CUDA_VISIBLE_DEVICES names them; none: the ranks run on the CPU.
    source: in words, what says so.
    notes: what the reader may not expect.
    """

    names: list[str]
    source: str
    notes: list[str]

    @property
    def divided(self) -> bool:
        """Whether there are MIG devices: CUDA shows a process the first of those that it may see, and no more."""
        return any(name.startswith("MIG-") for name in self.names)


def listed_gpus() -> tuple[list[Gpu], str]:
    """The GPUs of this host as `nvidia-smi -L` lists them, and why there are none. Raises SettingError."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False
        )
    except FileNotFoundError:
        return [], "there is no nvidia-smi"
    except OSError as error:
        return [], f"nvidia-smi cannot be run: {error.strerror}"
    except subprocess.TimeoutExpired:
        raise SettingError(
            f"nvidia-smi -L has not answered for {_PATIENCE_SECONDS} s: the driver hangs, this host needs a restart"
        ) from None
    if done.returncode:
        return [], f"nvidia-smi: {one_line(done.stdout + done.stderr, f'exit code {done.returncode}')}"
    return parse_listing(done.stdout), "nvidia-smi lists none"


def parse_listing(text: str) -> list[Gpu]:
    """The GPUs in what `nvidia-smi -L` prints."""
    gpus: list[Gpu] = []
    for line in text.splitlines():
        if found := _GPU.fullmatch(line):
            gpus.append(Gpu(found[2] or "", []))
        elif (found := _MIG.fullmatch(line)) and gpus:
            gpus[-1].migs.append(found[1])
    return gpus


def visible_devices(environment: Mapping[str, str], gpus: list[Gpu], why_none: str) -> Devices:
    """The devices that CUDA would show, and ends at where it would. Raises SettingError for what can only be meant
    otherwise: a device that is not here, or one twice, of which CUDA makes fewer devices or none, in silence.
    """
    value = environment.get(VARIABLE)
    if value is None:
        notes = [] if gpus or why_none == "there is no nvidia-smi" else [f"no GPU is used: {why_none}"]
        return Devices(_all(gpus), f"this host has {_count(sum(len(gpu.migs) or 1 for gpu in gpus))}", notes)
    names: list[str] = []
    notes = []
    entries = [entry.strip() for entry in value.strip().removesuffix(",").split(",")]
    for place, entry in enumerate(entries):
        if _END.fullmatch(entry) or entries == [""]:
            if names or entries[place + 1 :]:
                notes.append(f"{VARIABLE}={value} ends at {entry}, as CUDA reads it: {_count(len(names))}")
            break
        name = _named(entry, gpus, why_none)
        if name in names:
            raise SettingError(f"{VARIABLE}={value} names {entry} twice: CUDA would show no GPU at all")
        if names and name[:4] != names[0][:4] and not (name.isdigit() and names[0].isdigit()):
            raise SettingError(
                f"{VARIABLE}={value}: all by number, all by GPU-..., or all by MIG-...: CUDA takes no mix"
            )
        names.append(name)
    if gpus and not names:
        notes = [f"{VARIABLE}={value} shows none of the GPUs of this host: the ranks run on the CPU"]
    return Devices(names, f"{VARIABLE}={value} shows {_count(len(names))}", notes)


def _all(gpus: list[Gpu]) -> list[str]:
    """By number; where one is divided all by UUID, its MIG devices in its place."""
    if any(gpu.migs for gpu in gpus):
        return [name for gpu in gpus for name in gpu.migs or [gpu.uuid]]
    return [str(number) for number in range(len(gpus))]


def _named(entry: str, gpus: list[Gpu], why_none: str) -> str:
    """The full name of one that is here: a number, or a UUID of which `entry` may be the beginning."""
    where = f"{VARIABLE} has {entry or 'an empty place'}"
    if not gpus:
        raise SettingError(f"{where}, and this host has no GPU ({why_none}): for the CPU, {VARIABLE}= (empty)")
    if entry.isascii() and entry.isdigit():
        number = int(entry)
        if number >= len(gpus):
            raise SettingError(f"{where}, and this host has {_count(len(gpus))}: 0 to {len(gpus) - 1}")
        if gpus[number].migs:
            raise SettingError(f"{where}, a GPU that is divided: name its MIG devices, by UUID (nvidia-smi -L)")
        return str(number)
    if not entry.startswith(("GPU-", "MIG-")):
        raise SettingError(f"{where}: neither a number nor a UUID (GPU-..., MIG-...; nvidia-smi -L lists them)")
    known = [uuid for gpu in gpus for uuid in (gpu.uuid, *gpu.migs)]
    found = [uuid for uuid in known if uuid == entry] or [uuid for uuid in known if uuid.startswith(entry)]
    if len(found) != 1:
        several = f"which {len(found)} devices of this host begin with" if found else "which no device of this host has"
        raise SettingError(f"{where}, {several}: nvidia-smi -L lists them")
    if any(gpu.migs for gpu in gpus if gpu.uuid == found[0]):
        raise SettingError(f"{where}, a GPU that is divided: name its MIG devices (nvidia-smi -L lists them)")
    return found[0]


def shared_gpu_note(names: list[str], gpus: list[Gpu]) -> list[str]:
    """A note where several MIG devices of one GPU are to be ranks of one run."""
    for number, gpu in enumerate(gpus):
        if len(set(gpu.migs) & set(names)) > 1:
            return [
                f"several ranks are on MIG devices of GPU {number}: NCCL joins no two of one GPU ('Duplicate GPU "
                f"detected'); if it ends so, name one of each GPU in {VARIABLE}"
            ]
    return []


def _count(number: int) -> str:
    return f"{number} GPU{'' if number == 1 else 's'}"
