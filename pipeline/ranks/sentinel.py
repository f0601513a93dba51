"""A process beside a rank, which has the rank's stacks written where it runs no Python any more.

A thread that holds Python's lock holds the watchdog too, so the one that notices must not need the lock. A timer inside
of the process (`faulthandler.dump_traceback_later`) does not, but it also counts the time in which the process was
suspended: as that ends it walks the frames of threads that run again, and takes the rank down with it (CPython 3.11).
This process counts only time in which the rank could run, and the rank's frames then stand still.

`Sentinel` is the rank's side. The file is a program as well, for a Python without site-packages: it imports little.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import select
import signal
import struct
import subprocess
import sys

_SIGNAL = signal.SIGRTMIN + 9  # schedulers, launchers and MPI send others
_WORD = struct.Struct("=d")
_WORDS_AT_ONCE = 512


class Sentinel:
    """Started for this process, which is `rank`; at work until `close`.

    Looks every `interval` seconds. Where no process can be started there is none, and stacks are what one goes without.
    """

    def __init__(self, rank: int, interval: float) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        # -I and -S: 10 ms and 8 MB. Its own session: Ctrl-C and a launcher's signals to all are for the rank.
        words = [sys.executable, "-I", "-S", __file__, str(rank), str(interval)]
        faulthandler.register(_SIGNAL, file=2, all_threads=True)
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True, cwd="/")
            os.set_blocking(self._pipe(), False)

    def _pipe(self) -> int:
        assert self._process is not None
        assert self._process.stdin is not None
        return self._process.stdin.fileno()

    def tell(self, seconds: float) -> None:
        """This process runs Python; where it is not heard of for `seconds`, its stacks go to stderr."""
        if self._process is not None:
            # Full: the sentinel is stopped. Broken: somebody has ended it, and the rank goes on.
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._pipe(), _WORD.pack(seconds))

    def close(self) -> None:
        """It leaves."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            if process.poll() is None:  # data workers, forked from the rank, hold the pipe open
                process.kill()
                process.wait()
        faulthandler.unregister(_SIGNAL)


def main(rank: str, interval: float) -> None:
    """Until the rank is gone, or closes the pipe."""
    parent = os.getppid()
    quiet_seconds, seconds = 0.0, math.inf
    while os.getppid() == parent:
        if select.select([0], [], [], interval)[0]:
            data = os.read(0, _WORDS_AT_ONCE * _WORD.size)
            if not data:
                return
            quiet_seconds, seconds = 0.0, _WORD.unpack(data[-_WORD.size :])[0]
        elif _is_stopped(parent):
            quiet_seconds = 0.0
        else:
            # Not by a clock: one look after a suspension of both, however long, is one interval.
            quiet_seconds += interval
            if quiet_seconds >= seconds:
                with contextlib.suppress(OSError):
                    os.write(
                        2,
                        f"note: rank {rank} has run no Python for {quiet_seconds:.0f} s: a thread holds Python's lock "
                        "inside of C; where all of them are:\n".encode(),
                    )
                os.kill(parent, _SIGNAL)
                seconds = math.inf  # once, until it is heard of again


def _is_stopped(process: int) -> bool:
    """By a signal, or held by a debugger."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:  # no /proc, or just gone
        return False


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
