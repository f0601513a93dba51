"""Disks and limits of each host, and the run's folder: room, one folder for all hosts, nobody else in it."""

from __future__ import annotations

import fcntl
import os
import re
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.storage import TEMP_MARK
from pipeline.checkpoints.files import Meta, newest_good, step_folders
from pipeline.config.dense import SegmentConfig
from pipeline.config.detect import DetectConfig
from pipeline.config.run import RunConfig
from pipeline.doctor.report import Finding, Report, Reports, answered, differing, each, named, odd

_LOCK_TEXT = re.compile(r"process (\d+) on (\S+)")
_OPEN_FILES = 1024  # what the loader's limits were made for
_SHARED_GB = 1.0  # what NVIDIA gives containers for NCCL's segments
_SPARE_INODES = 10_000
_COPIES = 3  # weights and two moments of AdamW, fp32


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder


def look(config: RunConfig, is_first: bool, classes: int | None) -> Report:
    """Room by folder (bytes; inodes, None where the file system does not count them), limits, the run's lock.

    classes: for the size of a checkpoint that there is none of yet; None: it is not asked for.
    """
    folders = {"output_root": config.run_dir}
    if (config.data.is_remote and config.data.cache_gb) or config.data.stream_cache:
        folders["data.cache_folder"] = config.data.cache_folder.expanduser()
    if os.path.isdir("/dev/shm"):
        folders["/dev/shm"] = Path("/dev/shm")
    places = {name: _room(existing(folder)) for name, folder in folders.items()}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    checkpoints = step_folders(config.run_dir / "checkpoints")
    return {
        "places": places,
        "open_files": [soft, hard],
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "infiniband": os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband")),
        "lock": _lock(config.run_dir / ".lock", is_first),
        "checkpoints": len(checkpoints),
        "checkpoint_bytes": _checkpoint_bytes(config, classes) if is_first else None,
    }


def _room(folder: Path) -> dict[str, Any]:
    told = os.statvfs(folder)
    return {
        "folder": str(folder),
        "free": told.f_bavail * told.f_frsize,
        "total": told.f_blocks * told.f_frsize,
        "inodes": told.f_favail if told.f_files else None,
    }


def _checkpoint_bytes(config: RunConfig, classes: int | None) -> int | None:
    """Of one checkpoint: as the last one, or computed from the model. None: not known without torch."""
    found, _ = newest_good(config.run_dir / "checkpoints", hashes=False)
    if found is not None:
        return _bytes(found[1])
    if classes is None:
        return None
    import torch

    import_models()
    with torch.device("meta"):  # shapes alone
        model = _net(config, classes)
    copies = _COPIES + (config.optimizer.ema_decay is not None)
    return 4 * copies * sum(weight.numel() for weight in model.parameters())


def _net(config: RunConfig, classes: int) -> Any:
    if isinstance(config, SegmentConfig):
        from pipeline.dense.segmentor import Segmentor

        return Segmentor(config.model, classes, config.data.resolution)
    if isinstance(config, DetectConfig):
        from pipeline.detection.detector import build_detector

        return build_detector(config.model, classes, config.data.resolution)
    from pipeline.models.build import build_model

    return build_model(config.model, classes, config.data.resolution)


def _bytes(meta: Meta) -> int:
    return sum(file.bytes for file in meta.files.values())


def import_models() -> None:
    """Register the family with timm."""
    import pipeline.models  # noqa: F401


def _lock(path: Path, try_it: bool) -> dict[str, Any]:
    """Who wrote it, whether a process of this host or of any has it; taken for an instant, by one host alone."""
    text, held, alive = "", False, False
    with suppress(OSError), open(path, "r+", encoding="utf-8") as file:
        text = file.read().strip()
        if try_it:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = True
    match = _LOCK_TEXT.fullmatch(text)
    if match and match[2] == os.uname().nodename:
        with suppress(OSError):
            alive = b"pipeline" in Path(f"/proc/{match[1]}/cmdline").read_bytes()
    return {"by": text, "held": held, "alive": alive}


class Nonces:
    """Files that the hosts write into one folder to see each other's. Removed with the process, at the latest."""

    def __init__(self) -> None:
        self._mine: list[Path] = []

    def write(self, folder: str, nonce: str) -> str:
        """What is wrong, nothing where the file is written."""
        path = Path(folder) / f".doctor{TEMP_MARK}{nonce}"
        self._mine.append(path)
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(nonce)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def unseen(self, folder: str, nonces: list[str]) -> list[str]:
        """Those of the others that are not here."""
        return [nonce for nonce in nonces if not _holds(Path(folder) / f".doctor{TEMP_MARK}{nonce}", nonce)]

    def remove(self) -> None:
        for path in self._mine:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        self._mine.clear()


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False


def judge(reports: Reports, config: RunConfig) -> list[Finding]:
    """Room, limits and the lock."""
    told, findings = answered("disk", reports, "disks")
    if not told:
        return findings
    size = next(iter(told.values()))["checkpoint_bytes"]
    findings += _rooms(told, config, size)
    return [*findings, *_limits(told), *_held(told, config)]


def _rooms(told: dict[str, Report], config: RunConfig, size: int | None) -> list[Finding]:
    keep = config.checkpoint
    wanted = keep.keep_last + 1 + (keep.best_metric is not None)  # the new one comes before an old one goes
    full, short, inodes = {}, {}, {}
    for host, report in told.items():
        for name, place in report["places"].items():
            free = place["free"]
            if place["inodes"] is not None and place["inodes"] < _SPARE_INODES:
                inodes[host] = f"{place['folder']}: {place['inodes']:,} inodes left"
            if name == "output_root":
                need = max(1, wanted - report["checkpoints"]) * (size or 1)
                if free < need:
                    of = f"{wanted} checkpoints of {_amount(size)} need {_amount(need)} more" if size else "it is full"
                    full[host] = f"{place['folder']}: {_amount(free)} free, {of}"
            elif name == "data.cache_folder" and free < config.data.cache_gb * 1e9:
                short[host] = f"{name}: {_amount(free)} free, data.cache_gb is {config.data.cache_gb:g}"
    findings = each("disk", "fail", full, "make room, lower checkpoint.keep_last, or set another output_root")
    findings += each("disk", "warn", short, "what it holds already counts: else lower data.cache_gb")
    findings += each("disk", "fail", inodes, "remove files there: a disk without inodes takes no new ones")
    if not findings:
        room = {report["places"]["output_root"]["free"] for report in told.values()}
        of = f"; {wanted} checkpoints are {_amount(wanted * size)}" if size else ""
        findings.append(Finding("disk", "pass", f"at least {_amount(min(room))} free for checkpoints{of}"))
    return findings


def _limits(told: dict[str, Report]) -> list[Finding]:
    findings = []
    files = {host: report["open_files"][0] for host, report in told.items()}
    few = {host: f"{limit:,} open files a process" for host, limit in files.items() if 0 <= limit < _OPEN_FILES}
    findings += each("limits", "warn", few, f"ulimit -n {_OPEN_FILES} or more, in /etc/security/limits.conf there")
    if hosts := odd(files):
        text = f"open files a process: {differing(files)}"
        findings.append(Finding("limits", "warn", text, "the same limits on all hosts", hosts))
    bounded = {
        host: f"{report['locked_memory'] // 1024:,} KiB of locked memory, and InfiniBand"
        for host, report in told.items()
        if report["infiniband"] and report["locked_memory"] != resource.RLIM_INFINITY
    }
    findings += each("limits", "warn", bounded, "ulimit -l unlimited there: InfiniBand registers memory by locking it")
    small = {
        host: f"/dev/shm has {_amount(report['places']['/dev/shm']['free'])} free"
        for host, report in told.items()
        if "/dev/shm" in report["places"] and report["places"]["/dev/shm"]["free"] < _SHARED_GB * 1e9
    }
    findings += each("limits", "warn", small, "NCCL takes it between the GPUs of a host: --shm-size=1g for containers")
    return findings or [Finding("limits", "pass", f"{min(files.values()):,} open files, room in /dev/shm")]


def _held(told: dict[str, Report], config: RunConfig) -> list[Finding]:
    """The lock of the run folder: held, or its writer still lives where file systems know no locks of other hosts."""
    by = next((report["lock"]["by"] for report in told.values() if report["lock"]["held"]), None)
    if by is None:
        by = next((report["lock"]["by"] for report in told.values() if report["lock"]["alive"]), None)
    if by is None:
        return [Finding("run folder", "pass", f"nobody writes to {config.run_dir}")]
    match = _LOCK_TEXT.fullmatch(by)
    owner = next((host for host, report in told.items() if match and _is_named(host, report, match[2])), None)
    text = f"{config.run_dir} is being written by {by or 'another process'}"
    return [Finding("run folder", "fail", text, "end it, or set another name", (owner,) if owner else ())]


def _is_named(host: str, report: Report, name: str) -> bool:
    return host == name or (report["lock"]["alive"] and bool(name))


def judge_shared(
    folder: str, written: dict[str, str], unseen: dict[str, list[str]], rewritten: bool, several: bool
) -> list[Finding]:
    """written: of each host what is wrong with its file; unseen: the hosts whose files it does not see."""
    faults = {host: f"{folder} cannot be written to: {why}" for host, why in written.items() if why}
    findings = each("checkpoint folder", "fail", faults, "mount it for writing there, or set another output_root")
    blind: dict[str, str] = {}
    for host, others in unseen.items():
        others = [other for other in others if other not in faults]
        if others:
            blind[host] = f"{folder} is another folder than on {named(others)}"
    # Of two that do not see each other, the first host's folder is the one that counts.
    first = next(iter(written), None)
    if len(blind) > 1 and first in blind and first is not None:
        del blind[first]
    findings += each("checkpoint folder", "fail", blind, "set output_root to a file system that all hosts share")
    if not findings and rewritten:
        how = "written by each host, and read by all" if several else "can be written to"
        findings.append(Finding("checkpoint folder", "pass", f"{folder}: {how}"))
    return findings


def _amount(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
