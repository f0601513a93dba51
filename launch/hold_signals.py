"""Runs a command, and holds what a scheduler sends until the command has a handler for it: SIGUSR1 and SIGTERM.

    python launch/hold_signals.py COMMAND [ARGUMENT ...]

launch/torchrun.sh first checks, for seconds; there a shell would die of these signals, or lose them. The command is
started with both of them blocked, and becomes launch/torchrun_agent.py, which takes them blocked as they are and hands
them to its ranks. This process stays, passes on, and ends with the command's exit code. (Blocked signals are not
enough: bash drops those that it ignores.)
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_POLL_SECONDS = 0.1


def main(command: list[str]) -> int:
    """Returns the exit code, as a shell would say it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    process = subprocess.Popen(command)
    held: set[int] = set()
    while (code := process.poll()) is None:
        if came := signal.sigtimedwait(_SIGNALS, _POLL_SECONDS):
            held.add(came.si_signo)
        for number in [number for number in held if _catches(process.pid, number)]:
            process.send_signal(number)
            held.remove(number)
    return code if code >= 0 else 128 - code


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of a signal."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        name, _, mask = line.partition(":")
        if name == "SigCgt":
            return bool(int(mask, 16) >> (number - 1) & 1)
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
