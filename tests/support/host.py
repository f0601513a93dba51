"""A host to launch on: with stand-ins for nvidia-smi, ssh and Slurm's commands, and listings of GPUs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.support.runs import ROOT

UUIDS = [f"GPU-{letter * 8}-2222-3333-4444-555566667777" for letter in "ab"]
MIGS = [f"MIG-{letter * 8}-2222-3333-4444-555566667777" for letter in "mn"]
TWO_GPUS = "".join(f"GPU {i}: NVIDIA A100-SXM4-40GB (UUID: {uuid})\n" for i, uuid in enumerate(UUIDS))
TWO_MIGS = "".join(
    f"GPU {i}: NVIDIA A100-SXM4-40GB (UUID: {uuid})\n  MIG 3g.20gb     Device  0: (UUID: {mig})\n"
    for i, (uuid, mig) in enumerate(zip(UUIDS, MIGS, strict=True))
)
OURS = ("RANKS", "HOSTFILE", "NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "DEEPSPEED_ARGS", "DS_ACCELERATOR")


class Host:
    """A host with programs of its own on its PATH, and none of the variables that we read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def program(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def gpus(self, listing: str) -> None:
        self.program("nvidia-smi", f"printf %s {shlex.quote(listing)}")

    def places(self, launcher: str, **environment: str) -> subprocess.CompletedProcess[str]:
        ours = {n: v for n, v in os.environ.items() if n not in (*OURS, "CUDA_VISIBLE_DEVICES") and n[:5] != "SLURM"}
        return subprocess.run(
            [sys.executable, "-m", "launch.places", launcher],
            cwd=ROOT,
            env={**ours, "PATH": str(self.folder), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def told(self, launcher: str, **environment: str) -> dict[str, str]:
        """The variables of the shell that evaluates what is printed; arrays as words with a space between."""
        done = self.places(launcher, **environment)
        assert done.returncode == 0, done.stderr
        names = [
            "ranks",
            "nodes",
            "launch",
            "module",
            "RANKS",
            "PIPELINE_HOSTS",
            "PIPELINE_MASTER",
            *OURS,
            "CUDA_VISIBLE_DEVICES",
            "SRUN_CPUS_PER_TASK",
        ]
        script = done.stdout + "\n".join(f'echo {name}="${{{name}[*]}}"' for name in names)
        said = subprocess.run(["/bin/bash", "-c", script], env={}, capture_output=True, text=True, check=True).stdout
        return {name: value for name, _, value in (line.partition("=") for line in said.splitlines()) if value}

    def refused(self, launcher: str, **environment: str) -> str:
        """The one line that it says."""
        done = self.places(launcher, **environment)
        assert (done.returncode, done.stdout) == (1, ""), done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        return line
