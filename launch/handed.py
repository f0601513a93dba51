"""A rank on one of several hosts: becomes `python -m pipeline` with the command, the configuration and the environment
that the launching host has written down.

    python -m launch.handed FOLDER     as one word (pipeline/ranks/handover.py)
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.ranks.handover import HandoverError, from_word, read

# What mpirun tells its processes, under the names that torch has for it.
_OPENMPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}


def rank_environment(own: Mapping[str, str], handed: Mapping[str, str]) -> dict[str, str]:
    """`handed` over what this host has, and its environment's programs before others'."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', os.defpath)}"
    found = {**own, **handed, "PATH": path}
    if "RANK" not in own and "OMPI_COMM_WORLD_RANK" in own:
        found |= {name: own[theirs] for name, theirs in _OPENMPI.items()}
        found["MASTER_ADDR"], _, found["MASTER_PORT"] = handed["PIPELINE_MASTER"].rpartition(":")
    return found


def main(arguments: list[str]) -> int:
    """Does not return where all is there."""
    # A request to stop waits, across exec too, until the rank can answer it: it would die of it while it imports.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        (word,) = arguments
        handover = read(from_word(word))
    except HandoverError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    environment = rank_environment(os.environ, handover.environment)
    return os.execve(sys.executable, [sys.executable, "-u", "-m", "pipeline", *handover.arguments], environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
