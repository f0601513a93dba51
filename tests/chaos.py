"""Short pretrainings whose ranks and launchers are killed at random, started again by the same command until done.

    python -m tests.chaos [--runs 25] [--seed 0] [--hosts 2] [--folder DIR]

With --hosts the ranks, one a host, are on network namespaces of this machine (tests/support/cluster.py), and links are
pulled too. Each run has to end with the weights, EMA and optimizer state of an undisturbed one, to the last bit, and to
have trained on every sample of every epoch exactly once. Prints a table; exit code 1 where a run did not. `make chaos`
runs it, and the test suite a short form.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from safetensors.torch import load_file

from tests.support.cluster import Cluster, why_not
from tests.support.datasets import Datasets, build_datasets
from tests.support.processes import PATIENCE_SECONDS
from tests.support.runs import RECORDER, ROOT, log_of, small_run

EPOCHS, STEPS_PER_EPOCH, GLOBAL_BATCH = 6, 6, 16
STEPS = EPOCHS * STEPS_PER_EPOCH
DISTURBED_MAX = 3  # times a run: then it is left alone
AT_A_STEP = 0.7  # share of the disturbances that wait for a step; others come at any time from the start on
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
STALL_SECONDS = 15.0  # of hosts: a link that is down
LEFT_SECONDS = 200.0  # for ranks to leave that have lost their launcher or the others


@dataclass
class Outcome:
    """What became of one run."""

    launcher: str
    disturbances: list[str] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Chaos:
    """Runs in `folder` on the data sets, with an undisturbed one to compare to."""

    def __init__(self, datasets: Datasets, folder: Path, cluster: Cluster | None = None) -> None:
        self.datasets, self.folder, self.cluster = datasets, folder, cluster
        done = self._start("undisturbed", "deepspeed")
        assert done.wait() == 0, (folder / "undisturbed.out").read_text()[-3000:]

    def run(self, name: str, launcher: str, draw: random.Random, disturbances: int) -> Outcome:
        """One run, disturbed so many times; DISTURBED_MAX bounds how often it is started."""
        outcome = Outcome(launcher)
        for left in range(disturbances, -1, -1):
            process = self._start(name, launcher)
            if left:
                outcome.disturbances.append(self._disturb(name, process, draw))
            outcome.exit_codes.append(process.wait(timeout=PATIENCE_SECONDS))
            outcome.faults += self._left_behind()
            if outcome.exit_codes[-1] == 0:
                break
        if outcome.exit_codes[-1] != 0:
            tail = (self.folder / f"{name}.out").read_text()[-2000:]
            outcome.faults.append(f"the last, undisturbed try ended with {outcome.exit_codes[-1]}: {tail}")
            return outcome
        outcome.faults += self._differences(name) + self._wrong_samples(name)
        return outcome

    def _start(self, name: str, launcher: str) -> subprocess.Popen[bytes]:
        options = [f"name={name}", f"train.epochs={EPOCHS}", "evaluate.every_epochs=2", "checkpoint.every_steps=5"]
        options += [f"guard.stall_seconds={STALL_SECONDS}"] if self.cluster else []
        command = [str(ROOT / "launch" / f"{launcher}.sh"), *small_run(self.datasets, self.folder, *options)]
        record = self.folder / f"{name}.samples"
        record.mkdir(exist_ok=True)
        environment = {**os.environ, "RANKS": "2", "VENV": sys.prefix, "RECORD_SAMPLES": str(record)}
        environment["PYTHONPATH"] = str(RECORDER)
        with open(self.folder / f"{name}.out", "ab") as output:
            if self.cluster is not None:
                del environment["RANKS"]
                environment |= {"HOSTFILE": str(self.cluster.hostfile()), "PIPELINE_ENVIRONMENT": "RECORD_SAMPLES"}
                return self.cluster.start(
                    "node1", *command, environment=environment, cwd=ROOT, stdout=output, stderr=output
                )
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)

    def _disturb(self, name: str, process: subprocess.Popen[bytes], draw: random.Random) -> str:
        """Send one signal to one rank or to the launcher; returns what was done, in words."""
        victims = ["launcher", "rank 0", "rank 1"]
        if self.cluster is not None:
            victims += [f"{what} {name}" for what in ("host", "link") for name in self.cluster.names]
        number, victim = draw.choice(SIGNALS), draw.choice(victims)
        started = time.monotonic()
        if draw.random() < AT_A_STEP:
            step, delay = draw.randrange(1, STEPS), draw.random() * 0.3
            while self._last_step(name) < step and process.poll() is None:
                time.sleep(0.02)
            moment = f"step {step} + {delay:.2f} s"
        else:
            delay = draw.random() * 20
            moment = f"{delay:.1f} s"
        until = time.monotonic() + delay
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            return f"none: it was over after {time.monotonic() - started:.0f} s"
        if self.cluster is not None:
            return f"{self._disturb_hosts(victim, number)} at {moment}"
        target = process.pid if victim == "launcher" else rank_process(process.pid, int(victim[-1]))
        if target is None:  # not started yet
            victim, target = "launcher", process.pid
        os.kill(target, number)
        return f"{victim} {number.name} at {moment}"

    def _disturb_hosts(self, victim: str, number: signal.Signals) -> str:
        """One signal to the launcher or a rank, SIGKILL to all processes of a host, or its plug pulled."""
        assert self.cluster is not None
        what, _, name = victim.partition(" ")
        if what == "link":
            self.cluster.link(name, up=False)
            return f"link of {name} down"
        if what == "host":
            for process in self.cluster.processes(name):
                with suppress(psutil.Error):
                    process.kill()
            return f"all processes of {name} SIGKILL"
        if what == "rank" and (ranks := self.cluster.ranks(self.cluster.names[int(name)])):
            targets = ranks
        else:
            targets = [p for p in self.cluster.processes("node1") if "deepspeed_runner" in " ".join(p.cmdline())]
            victim = "launcher"
        for process in targets:
            process.send_signal(number)
        return f"{victim} {number.name}"

    def _left_behind(self) -> list[str]:
        """Processes on hosts where the launch is over, after the time that ranks without a launcher have."""
        if self.cluster is None:
            return []
        end = time.monotonic() + LEFT_SECONDS
        while left := [p for name in self.cluster.names for p in self.cluster.processes(name)]:
            if time.monotonic() > end:
                return [f"left behind: {[' '.join(p.cmdline())[:80] for p in left]}"]
            time.sleep(0.2)
        for name in self.cluster.names:
            self.cluster.link(name, up=True)
        return []

    def _last_step(self, name: str) -> int:
        try:
            return int(max(line["step"] for line in log_of(self.folder, name)))
        except (OSError, ValueError):
            return 0

    def _differences(self, name: str) -> list[str]:
        last = f"checkpoints/step-{STEPS:08d}"
        found = []
        for file in ("model", "ema", "optimizer"):
            ours, theirs = (
                load_file(self.folder / run / last / f"{file}.safetensors") for run in (name, "undisturbed")
            )
            found += [f"{file}: {key} differs" for key in theirs if not ours[key].equal(theirs[key])]
        steps = [int(line["step"]) for line in log_of(self.folder, name)]
        if steps != list(range(1, STEPS + 1)):
            found.append(f"log.jsonl has the steps {steps}")
        return found

    def _wrong_samples(self, name: str) -> list[str]:
        """Samples of an epoch that were trained on twice or never, in the tries that led to the end."""
        by_step: dict[int, dict[str, list[int]]] = {}
        for path in sorted((self.folder / f"{name}.samples").iterdir(), key=lambda path: int(path.stem.split("-")[0])):
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            rank = path.stem.split("-")[1]
            for line in lines:  # a later try does a step anew
                by_step.setdefault(line["step"], {})[rank] = line["samples"]
        found = []
        for epoch in range(EPOCHS):
            steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
            seen = [sample for step in steps for part in by_step[step].values() for sample in part]
            if len(seen) != len(set(seen)) or len(seen) != STEPS_PER_EPOCH * GLOBAL_BATCH:
                found.append(f"epoch {epoch}: {len(seen)} samples, {len(set(seen))} different ones")
        return found


def rank_process(launcher: int, rank: int) -> int | None:
    """The process id of a rank, among the launcher's descendants; None before it was started."""

    def rank_of(process: psutil.Process | None) -> str | None:
        try:
            return process.environ().get("RANK") if process else None
        except psutil.Error:
            return None

    for process in psutil.Process(launcher).children(recursive=True):
        # Its data workers have its environment too.
        if rank_of(process) == str(rank) and rank_of(process.parent()) is None:
            return int(process.pid)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=0, help="so many, with a rank each (none: this host alone)")
    parser.add_argument("--folder", type=Path, help="to keep the runs (a temporary one)")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the test suite
    draw = random.Random(options.seed)
    bad = 0
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        cluster = None
        if options.hosts:
            if reason := why_not():
                parser.error(reason)
            cluster = stack.enter_context(Cluster(options.hosts))
        chaos = Chaos(build_datasets(folder / "data"), folder, cluster)
        print("| run | launcher | disturbances | exit codes | bit-equal, each sample once |\n|---|---|---|---|---|")
        for number in range(options.runs):
            launcher = "deepspeed" if cluster else ("deepspeed", "torchrun")[number % 2]
            outcome = chaos.run(f"run-{number}", launcher, draw, draw.randrange(1, DISTURBED_MAX + 1))
            bad += bool(outcome.faults)
            verdict = "; ".join(outcome.faults)[:500].replace("\n", " ") or "yes"
            codes = ", ".join(map(str, outcome.exit_codes))
            print(f"| {number} | {launcher} | {'; '.join(outcome.disturbances)} | {codes} | {verdict} |", flush=True)
    print(f"{options.runs - bad} of {options.runs} runs ended as the undisturbed one")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
