"""torchrun's agent, for runs that can be asked to stop: its ranks get the signals that it gets, and it ends with the
exit code of the rank that ended first. (torchrun itself dies of SIGUSR1, ends its ranks 30 s after a SIGTERM, and turns
every code into 1 and a traceback.)

    python launch/torchrun_agent.py [torchrun's arguments]

Where REQUEUE_FILE names a file, exit code 75 makes that file and becomes 0 (launch/slurm.sbatch says why).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from pipeline.ranks.lifetime import EXIT_REQUEUE


def main() -> int:
    """Returns the exit code: of the rank that failed first, as a shell would say it, else 0."""
    # Slurm (proctrack/cgroup) signals a task alone, which is this process, and none of those that it started.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _pass_on)
    try:
        run.main(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])  # not SIGTERM
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code != EXIT_REQUEUE:
            print(error, file=sys.stderr, flush=True)  # names rank and host
        return _requeue() if code == EXIT_REQUEUE else code if code >= 0 else 128 - code
    return 0


def _requeue() -> int:
    """The exit code of a run that is to be queued again."""
    if file := os.environ.get("REQUEUE_FILE"):
        Path(file).touch()
        return 0
    return EXIT_REQUEUE


def _pass_on(number: int, _: object) -> None:
    if number == signal.SIGTERM and not psutil.Process().children():
        sys.exit(_requeue())  # nothing has begun
    threading.Thread(target=_to_ranks, args=(number,), daemon=True).start()


def _to_ranks(number: int) -> None:
    while not (ranks := psutil.Process().children()):
        time.sleep(0.2)  # the signal came before them
    for rank in ranks:
        threading.Thread(target=_send_when_caught, args=(rank, number), daemon=True).start()


def _send_when_caught(process: psutil.Process, number: int) -> None:
    """A rank that still imports would die of it: it gets it as soon as it has a handler."""
    with suppress(psutil.NoSuchProcess, OSError):
        while not _catches(process.pid, number):
            time.sleep(0.2)
        process.send_signal(number)


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of a signal. Raises OSError when it is gone."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        name, _, mask = line.partition(":")
        if name == "SigCgt":
            return bool(int(mask, 16) >> (number - 1) & 1)
    return False


if __name__ == "__main__":
    sys.exit(main())
