"""One live process group per run folder, and none that outlives its launcher."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LAUNCHER_VARIABLE = "PIPELINE_LAUNCHER"  # "HOST:PID" of the launcher, set by the scripts in launch/
_WAIT_SECONDS = 30.0


class RunBusyError(ValueError):
    """Another live process writes to the run folder."""


class Terminated(BaseException):
    """SIGTERM: a launcher ends its ranks when one has failed, Slurm when time is up. Not an error to be handled."""


def raise_on_sigterm() -> None:
    """Turn SIGTERM into `Terminated` in the main thread, so that a run is closed in order: its log, its MLflow run.

    The first one is raised; whatever follows is ignored, since launchers repeat it while a run is closing.
    """

    def end(*_: object) -> None:
        ignore_sigterm()
        raise Terminated

    signal.signal(signal.SIGTERM, end)


def ignore_sigterm() -> None:
    """The end is under way: a launcher that asks for it once more must not cut it short (its SIGKILL still can)."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for this process; the lock goes with the process and its data workers, however it ends.

    Waits for half a minute, in which the ranks of a launcher that was killed notice and leave. Raises RunBusyError.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    raise RunBusyError(f"{run_dir} is being written by {holder}: end it, or set another name") from None
                time.sleep(0.5)
            except OSError as error:  # some network file systems have no locks
                print(f"warning: {run_dir} cannot be locked ({error}); two runs into it would collide", file=sys.stderr)
                break
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def leave_with_launcher() -> None:
    """End this process within seconds of its launcher's end: of its parent, and of the process that the scripts in
    launch/ named, if that ran on this host.

    `deepspeed` killed with SIGKILL takes none of its ranks along: they would train on, unseen, in the way of the next
    start. Without a launcher nothing is watched.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    host, _, pid = os.environ.get(LAUNCHER_VARIABLE, "").rpartition(":")
    watched = [os.getppid()] + ([int(pid)] if host == socket.gethostname() and pid.isdigit() else [])

    def watch() -> None:
        while all(map(_is_alive, watched)):
            time.sleep(1.0)
        print("error: the launcher is gone; this rank leaves", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"  # a zombie is dead and not yet reaped
    except FileNotFoundError:
        return False
