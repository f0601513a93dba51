"""Runs that share the processes of a launch (programs/many_runs.py), and what they have recorded, step by step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.runs import ROOT

Job = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One step, as its ranks knew it: what is bit-equal is equal as text."""

    step: int
    loss: float
    exact: str
    samples: tuple[int, ...]
    ranks: int


@dataclass(frozen=True)
class Recorded:
    """What is in the folders of such runs."""

    root: Path

    def lines(self, name: str) -> list[Line]:
        """Every step of a run in order, with the samples of all ranks together."""
        by_step: dict[int, list[dict]] = {}
        for path in sorted((self.root / name).glob("record-*.jsonl")):
            for text in path.read_text().splitlines():
                line = json.loads(text)
                by_step.setdefault(line["step"], []).append(line)
        found = []
        for step, lines in sorted(by_step.items()):
            assert len(lines) == lines[0]["ranks"], f"step {step} of {name} was done more than once"
            assert len({(line["loss"], line["grad_norm"]) for line in lines}) == 1, "ranks differ"
            exact = f"{lines[0]['loss']} {lines[0]['grad_norm']}"
            samples = tuple(sample for line in lines for sample in line["samples"])
            found.append(Line(step, float.fromhex(lines[0]["loss"]), exact, samples, lines[0]["ranks"]))
        return found

    def folder(self, name: str, step: int) -> Path:
        return self.root / name / "checkpoints" / f"step-{step:08d}"

    def tensors(self, name: str, step: int) -> dict[str, torch.Tensor]:
        files = ("model", "ema", "optimizer")
        return {
            f"{file}:{key}": tensor
            for file in files
            for key, tensor in load_file(self.folder(name, step) / f"{file}.safetensors").items()
        }

    def bit_equal(self, name: str, other: str, step: int) -> bool:
        ours, theirs = self.tensors(name, step), self.tensors(other, step)
        assert {key.partition(":")[0] for key in theirs} == {"model", "ema", "optimizer"}
        assert ours.keys() == theirs.keys()
        return all(torch.equal(ours[key], theirs[key]) for key in theirs)


def launch_jobs(ranks: int, root: Path, jobs: list[Job]) -> str:
    path = root / "jobs.json"
    # By stage: DeepSpeed's stage 3 leaves its own F.linear behind in the process, whose last bits differ.
    jobs = sorted(jobs, key=lambda job: next(text for text in job["arguments"] if "zero_stage" in text))
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "support" / "programs" / "many_runs.py"), str(path)],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout.endswith("done\n")
    return done.stderr
