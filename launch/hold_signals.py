"""Becomes a command with SIGUSR1 and SIGTERM blocked: what a scheduler sends meanwhile waits until what the command
becomes unblocks them (launch/torchrun_agent.py). A shell can only ignore a signal, which loses it.

    python launch/hold_signals.py COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM))
    os.execvp(sys.argv[1], sys.argv[1:])
