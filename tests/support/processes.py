"""Processes that tests start and watch, and waiting for what they do."""

from __future__ import annotations

import multiprocessing
import subprocess
import time
from collections.abc import Callable

import psutil

PATIENCE_SECONDS = 600.0  # for what takes moments: a machine that is busy with other things is no error

Workers = Callable[[], list[psutil.Process]]


def wait_for(
    condition: Callable[[], object],
    process: subprocess.Popen | None = None,
    told: Callable[[], object] = lambda: "waited in vain",
) -> None:
    """Until the condition holds; fails with what is `told` where `process` ends before, or nothing comes of it."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process is None or process.poll() is None or condition(), told()
        assert time.monotonic() < end, told()
        time.sleep(0.01)


def is_over(process: psutil.Process) -> bool:
    """Whether a process has ended; its parent may not have asked yet how."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_idle(process: psutil.Process, looks: int = 5) -> bool:
    """Whether all its threads wait for something, as far as some looks tell."""
    before = process.cpu_times()
    for _ in range(looks):
        time.sleep(0.05)
        if process.status() != psutil.STATUS_SLEEPING or process.cpu_times() != before:
            return False
    return True


def children() -> list[psutil.Process]:
    """Those of this process that run."""
    multiprocessing.active_children()  # lets go of those that have ended
    return [child for child in psutil.Process().children() if not is_over(child)]
