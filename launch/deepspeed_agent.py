"""DeepSpeed's launcher of the ranks of one host: what the `deepspeed` command starts there as a second process, which
imports torch and DeepSpeed once more.

    python -m launch.deepspeed_agent [arguments of deepspeed.launcher.launch]
"""

from __future__ import annotations

import os
import signal
import sys

# Where mlflow is installed DeepSpeed 0.19.8 imports it, for its autotuner: seconds. Now it seems missing.
sys.modules["mlflow"] = None  # type: ignore[assignment]
from deepspeed.launcher import launch  # noqa: E402


def main() -> int:
    """Run the ranks; returns the exit code of the first that failed, else 0."""
    # A request to stop waits in each rank until it can answer: it would be lost while the rank imports.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        launch.main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)  # the ranks have ended; taking a thousand modules apart takes a second
