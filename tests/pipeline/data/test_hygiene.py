"""Loaders leave nothing behind: no growing memory, no orphans, no shared memory; they refuse clearly, never hang."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.data.loader import training_batches
from pipeline.ranks.collectives import Ranks
from tests.support.datasets import Datasets, needs_ffcv
from tests.support.loading import configured, read
from tests.support.processes import PATIENCE_SECONDS, Workers, wait_for
from tests.support.runs import ROOT, run_module, small_run

WAYS = [
    pytest.param(("augment.where=host", "data.workers_per_rank=2"), id="host"),
    pytest.param(("augment.where=device", "data.workers_per_rank=2"), id="device"),
    pytest.param(("data.format=ffcv", "augment.where=device", "data.workers_per_rank=1"), id="ffcv", marks=needs_ffcv),
]


@pytest.mark.parametrize("options", WAYS)
def test_memory_is_flat_over_20_epochs(datasets: Datasets, options: tuple[str, ...]) -> None:
    """What the data workers hold for themselves, MB; shared pages, which come and go with batches, aside.

    In a process of its own: pages that a worker shares with its parent become its own when the parent writes to them.
    """
    script = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from pathlib import Path\n"
        "import psutil\n"
        "from tests.support.datasets import Datasets\n"
        "from tests.support.loading import configured\n"
        "from pipeline.ranks.collectives import Ranks; from pipeline.data.loader import training_batches\n"
        f"config, manifest, order = configured(Datasets(Path({str(datasets.in22k)!r}), Path()), *{options!r})\n"
        "steps = order.steps_per_epoch\n"
        "for number, _ in enumerate(training_batches(config, manifest, order, Ranks(), 0, 22 * steps)):\n"
        "    if number % (4 * steps) == 0:\n"  # a fourth of an epoch: four micro-batches a step
        "        workers = psutil.Process().children(recursive=True)\n"
        "        print(sum(worker.memory_full_info().uss for worker in workers) / 1e6)\n"
        "left = psutil.Process().children(recursive=True)\n"
        "sys.exit(f'{left} are left' if any('resource_tracker' not in str(p.cmdline()) for p in left) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = [float(line) for line in done.stdout.split()]
    assert len(seen) == 22, seen
    early, late = max(seen[4:8]), max(seen[-4:])  # from epoch 4 on: compiled, caches filled
    assert late - early < 4, seen


@pytest.mark.parametrize("options", WAYS)
def test_sigkill_leaves_no_process_and_no_shared_memory(
    datasets: Datasets, tmp_path: Path, options: tuple[str, ...]
) -> None:
    script = tmp_path / "reads.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from pathlib import Path\n"
        "from tests.support.datasets import Datasets\n"
        "from tests.support.loading import configured\n"
        "from pipeline.ranks.collectives import Ranks; from pipeline.data.loader import training_batches\n"
        f"config, manifest, order = configured(Datasets(Path({str(datasets.in22k)!r}), Path()), *{options!r})\n"
        "batches = training_batches(config, manifest, order, Ranks(), 0, 60)\n"
        "held = [next(batches) for _ in range(3)]\n"
        "print('reading', flush=True)\n"
        "sys.stdin.read()\n"  # until it is killed
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "reading\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    for pid in (process.pid, *(worker.pid for worker in workers)):  # what is made there may be left there
        assert "/dev/shm/torch" not in Path(f"/proc/{pid}/maps").read_text()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=PATIENCE_SECONDS)
    assert not alive
    names = {str(pid) for pid in (process.pid, *(worker.pid for worker in workers))}
    assert not [name for name in os.listdir("/dev/shm") if names & set(re.split(r"[^0-9]+", name))]


def test_a_consumer_that_stops_early_ends_its_workers(datasets: Datasets, data_workers: Workers) -> None:
    for options in (("augment.where=host",), ("augment.where=device",)):
        config, manifest, order = configured(datasets, *options, "data.workers_per_rank=2")
        batches = training_batches(config, manifest, order, Ranks(), 0, 60)
        next(batches)
        assert data_workers()
        del batches
        wait_for(lambda: not data_workers())


def test_a_split_smaller_than_a_batch(datasets: Datasets, tmp_path: Path) -> None:
    arguments = small_run(datasets, tmp_path, "train.global_batch=128", "train.micro_batch=64")
    done = run_module("pipeline", *arguments, "--check")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("error: 96 training samples do not fill one global batch of 128; lower train.global_batch\n")


def test_more_ranks_than_shards_and_samples_per_step(datasets: Datasets) -> None:
    """Eight ranks of two images each, on three shards of 40, 40 and 16 samples."""
    whole = read(datasets, 0, 2, "train.micro_batch=2")
    parts = [read(datasets, 0, 2, "train.micro_batch=2", "augment.mixup_alpha=0", rank=r, ranks=8) for r in range(8)]
    for step in range(2):
        together = [sample for part in parts for sample in part[step].samples.tolist()]
        assert together == [s for batch in whole[8 * step : 8 * step + 8] for s in batch.samples.tolist()]
