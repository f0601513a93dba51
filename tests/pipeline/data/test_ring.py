"""The ring of batch buffers: back-pressure, early ends, deaths of workers; nothing waits for ever."""

import subprocess
import sys
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess

import numpy as np
import psutil
import pytest
import torch

from pipeline.data.loader import training_batches, validation_batches
from pipeline.data.ring import PREFETCHED_BATCHES, Ring, RingBatch, RingClosed
from pipeline.ranks.collectives import Ranks
from tests.support.datasets import Datasets
from tests.support.loading import ON_DEVICE, configured, numbers, read
from tests.support.processes import PATIENCE_SECONDS, Workers, is_idle, is_over, wait_for
from tests.support.runs import ROOT

WORKER = (ON_DEVICE, "data.workers_per_rank=2")


@pytest.mark.parametrize(("dtype", "shape"), [("uint8", (1, 2, 2, 3)), ("float32", (1, 3, 2, 2))])
def test_slots_go_round(dtype: str, shape: tuple[int, ...]) -> None:
    """Workers wait for a slot until one is given back, or the ring is closed."""
    workers = 3
    ring, queue = Ring(12 * np.dtype(dtype).itemsize, workers=workers), get_context("fork").SimpleQueue()

    def fill(number: int) -> None:
        try:
            for value in range(number, 250, workers):
                slot = ring.take()
                ring.array(slot, shape, dtype)[:] = value
                queue.put(RingBatch(ring.number, slot, shape, dtype, np.full((3, 1), value), ()))
        except RingClosed:
            queue.put("closed")

    processes = [get_context("fork").Process(target=fill, args=(number,), daemon=True) for number in range(workers)]
    for process in processes:
        process.start()
    slots = workers * PREFETCHED_BATCHES + 2
    held = [queue.get() for _ in range(slots)]
    wait_for(lambda: all(is_idle(psutil.Process(process.pid)) for process in processes))
    assert queue.empty()  # all slots are out
    seen = set()
    for _ in range(10 * slots):
        batch = held.pop(0).batch()
        assert batch.images.shape == (1, 3, 2, 2)
        assert batch.images.unique().tolist() == batch.labels.tolist()
        seen.add(int(batch.labels))
        held.append(queue.get())
    assert len(seen) == 10 * slots
    ring.close()
    for process in processes:
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == 0
    rest = [queue.get() for _ in range(workers)]
    assert rest == ["closed"] * workers


def test_leaving_early_needs_no_signal(
    datasets: Datasets, data_workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is waiting for a buffer by then. A DataLoader kills what is still there after some seconds."""
    killed: list[int | None] = []
    monkeypatch.setattr(BaseProcess, "terminate", lambda process: killed.append(process.pid) or process.kill())
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", PATIENCE_SECONDS / 2)
    config, manifest, order = configured(datasets, *WORKER)
    for make in (
        lambda: training_batches(config, manifest, order, Ranks(), 0, 600),
        lambda: validation_batches(config, manifest, Ranks()),
    ):
        batches = make()
        next(batches)
        (worker,) = data_workers()
        wait_for(partial(is_idle, worker))
        batches.close()
        assert is_over(worker)
        assert not killed


def test_batches_stay_what_they_are_and_rings_keep_apart(datasets: Datasets) -> None:
    config, manifest, order = configured(datasets, *WORKER)
    first, second = (training_batches(config, manifest, order, Ranks(rank, 2), 0, 30) for rank in (0, 1))
    held = [batch for pair in zip(first, second, strict=True) for batch in pair]
    alone = read(datasets, 0, 30, ON_DEVICE, "data.workers_per_rank=0", ranks=2)
    assert (numbers(held[::2]) == numbers(alone)).all()
    assert all(torch.equal(a.images, b.images) for a, b in zip(held[::2], alone, strict=True))


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, ".")
from pathlib import Path
import psutil
from tests.support.datasets import Datasets
from tests.support.loading import configured
from pipeline.__main__ import _explain
from pipeline.ranks.collectives import Ranks; from pipeline.data.loader import training_batches
config, manifest, order = configured(Datasets(Path(sys.argv[1]), Path()), *sys.argv[2:])
try:
    batches = training_batches(config, manifest, order, Ranks(), 0, 6000)
    next(batches)
    os.kill(psutil.Process().children()[0].pid, signal.SIGKILL)
    for _ in batches:
        time.sleep(0.01)
except Exception as error:
    print(_explain(error), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(("where", "workers"), [("host", 1), ("host", 3), ("device", 1)])
def test_a_killed_worker_is_one_line(datasets: Datasets, where: str, workers: int) -> None:
    """Whether the rank waits for it, or computes: torch raises it in the main thread wherever that is, so that the rank
    is a process of its own here. The others, which share its ring, do not wait for ever either."""
    command = [sys.executable, "-c", SCRIPT, str(datasets.in22k), f"augment.where={where}"]
    command.append(f"data.workers_per_rank={workers}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "a data worker was killed" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
