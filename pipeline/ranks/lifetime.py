"""One live process group per run folder, none that outlives its launcher, and an end that can be asked for."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from data_prep.storage import Folder, refuse_unwritable
from pipeline.ranks.handover import VARIABLE as HANDOVER_VARIABLE
from pipeline.ranks.log_file import say_at_once

EXIT_REQUEUE = 75  # EX_TEMPFAIL: asked to stop, and nothing is lost; the same command goes on
LAUNCHER_VARIABLE = "PIPELINE_LAUNCHER"  # "HOST:PID" of the launcher, set by the scripts in launch/
LAUNCHER_GONE = "the launcher is gone"
_REPEAT_SECONDS = 3.0  # launchers pass on what the ranks also got themselves, and repeat it: all that is one signal
_ALONE_SECONDS = 120.0  # without a launcher: time for the step under way and a last checkpoint
_WAIT_SECONDS = 150.0  # for the lock: longer than that, or the next start would find the folder busy
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_STOP_FILE = ".stop"  # of the run folder: `make stop` writes it, or of one launch its launcher, and rank 0 reads


class RunBusyError(ValueError):
    """Another live process writes to the run folder."""


class Terminated(BaseException):
    """Asked to stop before there was anything to save: the same command starts over. Not an error to be handled."""


class StopRequest:
    """What SIGTERM and SIGUSR1 ask of this rank: to stop where that loses nothing. One per process.

    It goes through three phases:

    - at first there is nothing to save: the first signal raises Terminated in the main thread of a rank that is alone.
      With others it sets `requested`, and all of them leave together (rendezvous.py, Watchdog);
    - after `arm` it sets `requested`: the training loop, on all ranks together, saves and leaves with EXIT_REQUEUE;
    - after `disarm` the run is closing, which a signal does not hasten.

    In each of them a second signal, more than 3 s after the first, ends the process at once, with code 128 + number,
    wherever its main thread is: Python runs a handler only between bytecodes, and a rank may hang in a collective. What
    came before `disarm` does not count after it: the launcher's SIGTERM is then the first, and cuts nothing short.
    """

    def __init__(self) -> None:
        """Installs the handlers; only in the main thread. Raises ValueError in another."""
        global _of_this_process
        self.reason = ""  # "SIGUSR1", ..., once requested
        self._phase: Literal["starting", "armed", "closing"] = "starting"
        self._first_signal: float | None = None  # time.monotonic(), seconds
        self._unsaid = threading.Lock()  # taken once, by whoever tells of the request; never waited for
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        self._alone = os.environ.get("WORLD_SIZE", "1") == "1"
        for number in _SIGNALS:
            signal.signal(number, self._in_main_thread)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(told,), name="stop request", daemon=True).start()
        _of_this_process = self
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # what came while this process began comes now

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop, and is to tell the others."""
        return bool(self.reason)

    @property
    def armed(self) -> bool:
        """Whether a request is answered by a checkpoint."""
        return self._phase == "armed"

    @property
    def starting(self) -> bool:
        """Whether there is nothing to save yet."""
        return self._phase == "starting"

    @property
    def closing(self) -> bool:
        """Whether the run is past its last checkpoint, or has given up."""
        return self._phase == "closing"

    def arm(self) -> None:
        """From now on there is something to save."""
        self._phase = "armed"

    def disarm(self) -> None:
        """The run is closing: its last checkpoint is written, or it has failed."""
        self._phase = "closing"
        self._first_signal = None

    def ask(self, reason: str, then: str = "") -> None:
        """Set `requested`, as a signal does, and say so in a line on stderr that ends with `then`."""
        if not self.closing and self._unsaid.acquire(blocking=False):
            self.reason = reason
            # Not print: a signal may have come in the middle of one.
            if self.armed:
                say_at_once(f"{reason}: a checkpoint follows at the next step; {then}")
            elif not self._alone:
                say_at_once(f"{reason}: the run has not begun, all ranks leave")

    def _in_main_thread(self, number: int, _: object) -> None:
        if self._phase == "starting" and self._alone:
            self._phase = "closing"
            raise Terminated
        self._ask_by(number)

    def _ask_by(self, number: int) -> None:
        self.ask(signal.Signals(number).name, "once more ends this rank at once")

    def _listen(self, told: int) -> None:
        """Reads the number of each signal as it comes, whatever the main thread does."""
        while True:
            for number in os.read(told, 64):
                if number not in _SIGNALS:
                    continue
                now = time.monotonic()
                if self._first_signal is None:
                    self._first_signal = now
                elif now - self._first_signal > _REPEAT_SECONDS:
                    say_at_once(f"{signal.Signals(number).name} once more: this rank ends at once")
                    os._exit(128 + number)
                self._ask_by(number)


_of_this_process: StopRequest | None = None


def ignore_sigterm() -> None:
    """The end is under way: a launcher that asks for it once more must not cut it short (`StopRequest.disarm`)."""
    if _of_this_process is not None:
        _of_this_process.disarm()


@contextmanager
def leaving_by_exception() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does, so that what is unfinished is removed on the way. For a process that is
    alone: one that waits for others inside a collective would not see it.
    """

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    former = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for this process; the lock goes with the process and its data workers, however it ends.

    Waits for 150 s, in which the ranks of a launcher that was killed notice, save and leave. Raises RunBusyError, and
    StorageError where it cannot be written.
    """
    refuse_unwritable(Folder(run_dir), "set another output_root")
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a+", encoding="utf-8") as file:
        deadline, told = time.monotonic() + _WAIT_SECONDS, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                    raise RunBusyError(f"{run_dir} is being written by {holder}: end it, or set another name") from None
                if not told:
                    say_at_once(
                        f"note: {run_dir} is being written by another process. A rank of the last launch leaves within "
                        f"{_WAIT_SECONDS:.0f} s; for another run set another name"
                    )
                    told = True
                time.sleep(0.5)
            except OSError as error:  # some network file systems have no locks
                print(f"warning: {run_dir} cannot be locked ({error}); two runs into it would collide", file=sys.stderr)
                break
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def ask_to_stop(run_dir: Path, reason: str, launch: str = "") -> None:
    """Ask the run in `run_dir` to stop, from any host: its rank 0 looks for that. With `launch` (handover.py) that one
    alone, whether it has begun or not: another may be under way in the folder, or wait for it. Raises OSError.
    """
    _stop_file(run_dir, launch).write_text(reason + "\n", encoding="utf-8")


def withdraw_stop(run_dir: Path, launch: str = "") -> None:
    """Nobody is left to be asked."""
    with suppress(OSError):
        _stop_file(run_dir, launch).unlink()


def heed_launch(run_dir: Path, request: StopRequest) -> None:
    """From now on `request` hears of what its own launcher asks by `ask_to_stop`; for rank 0, from its beginning on."""
    if folder := os.environ.get(HANDOVER_VARIABLE):
        _heed(_stop_file(run_dir, Path(folder).name), request)


def heed_stop_file(run_dir: Path, request: StopRequest) -> None:
    """From now on `request` hears of what anybody asks by `ask_to_stop`; for rank 0, which holds the run folder. What
    was asked of the run before this try does not count.
    """
    with suppress(OSError):  # one file system, one clock: that of the lock was written when this try took it
        if _stop_file(run_dir).stat().st_mtime < (run_dir / ".lock").stat().st_mtime:
            withdraw_stop(run_dir)
    _heed(_stop_file(run_dir), request)


def _stop_file(run_dir: Path, launch: str = "") -> Path:
    return run_dir / (f"{_STOP_FILE}-{launch}" if launch else _STOP_FILE)


def _heed(path: Path, request: StopRequest) -> None:
    def watch() -> None:
        while not request.closing:
            with suppress(OSError):
                reason = path.read_text(encoding="utf-8").strip() or "asked to stop"
                path.unlink()
                request.ask(reason, "a signal to a rank ends that rank at once")
            time.sleep(1.0)

    threading.Thread(target=watch, name="stop file", daemon=True).start()


def holder_of(run_dir: Path) -> str | None:
    """Who writes to the run folder ("process 17 on node1"); None where nobody does. Raises OSError."""
    try:
        with open(run_dir / ".lock", "r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # not LOCK_EX: two that look are no writers
            except BlockingIOError:
                return file.read().strip() or "another process"
    except FileNotFoundError:
        pass
    return None


def leave_with_launcher(request: StopRequest) -> None:
    """End this process within seconds of its launcher's end: of its parent, of the process that the scripts in launch/
    named, if that ran on this host, and of the ssh session that it came by. Where there is something to save, `request`
    asks for that first.

    `deepspeed` killed by SIGKILL, or by SIGTERM, takes none of its ranks along: they would train on, unseen, in the way
    of the next start. Without a launcher nothing is watched.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    host, _, pid = os.environ.get(LAUNCHER_VARIABLE, "").rpartition(":")
    launcher = [int(pid)] if host == os.uname().nodename and pid.isdigit() else []
    watched = [os.getppid(), *launcher]
    if HANDOVER_VARIABLE in os.environ:
        watched += _ssh_session(launcher)

    def watch() -> None:
        while all(map(_is_alive, watched)):
            time.sleep(1.0)
        if request.armed or request.closing:
            request.ask(LAUNCHER_GONE, f"this rank leaves within {_ALONE_SECONDS:.0f} s")
            time.sleep(_ALONE_SECONDS)
        say_at_once(f"error: {LAUNCHER_GONE}; this rank leaves")
        os._exit(1)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()


def _ssh_session(launcher: list[int]) -> list[int]:
    """The process of sshd that pdsh has reached this host by: it ends with its connection, and what it runs lives on.
    None above `launcher`: that is the user's own, who may log out.
    """
    pid = os.getppid()
    with suppress(OSError):
        while pid > 1 and pid not in launcher:
            with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
                name, _, rest = file.read().partition("(")[2].rpartition(")")
            if name.startswith("sshd"):
                return [pid]
            pid = int(rest.split()[1])
    return []


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"  # a zombie is dead and not yet reaped
    except FileNotFoundError:
        return False
