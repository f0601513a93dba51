"""How fast the configured loader is on this host, and whether that is enough: ``python -m pipeline bench-data CONFIG``.

Each rank is a process that takes training batches as a run does, as fast as they come. What was read ahead before the
clock started is thrown away first; then images, wall time and CPU time are counted together.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn

from pipeline.bench_data.feeds import Feed, feed_of
from pipeline.bench_data.report import HostSpeed, RankSpeed, needed_by, table_of
from pipeline.config.run import RunConfig
from pipeline.config.sections import ConfigError
from pipeline.data.ring import PREFETCHED_BATCHES
from pipeline.data.shards import DataError
from pipeline.ranks.collectives import Ranks

_TICKS = os.sysconf("SC_CLK_TCK")


def run(
    config: RunConfig,
    seconds: float,
    ranks_per_node: int | None,
    need: float | None,
    of_run: Path | None,
    nodes: int = 1,
) -> HostSpeed:
    """Measure for `seconds`, print the table, return what is in it. Raises ConfigError, DataError, ManifestError."""
    ranks_per_node = torch.cuda.device_count() or 1 if ranks_per_node is None else ranks_per_node
    if seconds <= 0 or ranks_per_node < 1 or nodes < 1 or (need is not None and need <= 0):
        raise ConfigError("--seconds, --ranks-per-node, --nodes and --need have to be above 0")
    needed = need if of_run is None else needed_by(of_run) / nodes
    config.train.accumulation_steps(nodes * ranks_per_node)
    feed = feed_of(config)
    # As under the launchers: what torch does in a rank itself takes one thread.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cores = len(os.sched_getaffinity(0))
    speed = HostSpeed(tuple(_measure(feed, seconds, ranks_per_node, nodes)), cores, needed)
    Console(width=None if Console().is_terminal else 110).print(table_of(feed, speed, of_run))
    return speed


def _measure(feed: Feed, seconds: float, ranks: int, nodes: int) -> list[RankSpeed]:
    context = get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(target=_rank, args=(there, os.getpid(), feed, rank, nodes * ranks, seconds))
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        columns = [*Progress.get_default_columns(), TextColumn("{task.fields[now]}")]
        screen = Console(stderr=True)
        with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
            task = progress.add_task("first batches", total=ranks, now="")
            for _ in _answers(pipes, "ready"):
                progress.advance(task)
            progress.remove_task(task)
            for pipe in pipes:
                pipe.send("go")
            task = progress.add_task("measuring", total=seconds * ranks, now="")
            done: list[RankSpeed] = []
            for told in _answers(pipes, "done"):
                if isinstance(told, RankSpeed):
                    done.append(told)
                else:
                    elapsed, images = told
                    progress.update(task, advance=elapsed, now=f"{images * ranks / elapsed:,.0f} images/s")
        return done
    finally:
        for process in processes:
            process.kill()  # its data workers end with it
            process.join()


def _answers(pipes: Sequence[Any], last: str) -> Iterator[Any]:
    """What the ranks send, until each has sent `last`, which is yielded too. Raises DataError."""
    open_pipes = list(pipes)
    while open_pipes:
        ready: list[Any] = connection.wait(open_pipes)
        for pipe in ready:
            try:
                kind, told = pipe.recv()
            except EOFError:
                raise DataError("a rank's process died: its message is above, or it was killed for memory") from None
            if kind == "error":
                raise told
            if kind == last:
                open_pipes.remove(pipe)
            yield told


def _rank(pipe: Any, parent: int, feed: Feed, rank: int, ranks: int, seconds: float) -> None:
    """A rank's process: sends ("ready", None), waits for a word, then sends ("tick", ...) and ("done", RankSpeed)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends this one
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    try:
        _run_rank(pipe, feed, rank, ranks, seconds)
    except ValueError as error:
        pipe.send(("error", DataError(" ".join(str(error).split()))))


def _run_rank(pipe: Any, feed: Feed, rank: int, ranks: int, seconds: float) -> None:
    begun = time.monotonic()
    batches = feed.batches(Ranks(rank, ranks))
    next(batches)
    first_batch_seconds = time.monotonic() - begun
    pipe.send(("ready", None))
    pipe.recv()
    for _ in range(PREFETCHED_BATCHES * (max(1, feed.processes) + 1)):
        next(batches)
    images, bad, samples = 0, 0, []
    cpu_begun, begun = _tree_cpu_seconds(), time.monotonic()
    told, told_images = begun, 0
    while time.monotonic() < begun + seconds:
        batch = next(batches)
        images, bad = images + len(batch.samples), bad + len(batch.bad)
        samples.append(batch.samples.numpy())
        now = time.monotonic()
        if now - told > 0.5:
            pipe.send(("tick", (now - told, images - told_images)))
            told, told_images = now, images
    elapsed, cpu_seconds = time.monotonic() - begun, _tree_cpu_seconds() - cpu_begun
    size = feed.bytes_per_image(np.concatenate(samples))
    speed = RankSpeed(images, elapsed, cpu_seconds, first_batch_seconds, size, _tree_memory_bytes(), bad)
    pipe.send(("done", speed))


def _tree() -> list[tuple[int, list[str]]]:
    """(pid, the fields of /proc/PID/stat from its state on) of this process and all below it."""
    stats: dict[int, list[str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may be gone by now
            stats[int(folder.name)] = (folder / "stat").read_text().rpartition(")")[2].split()
    found = [os.getpid()]
    for pid in found:  # grows
        found += [child for child, fields in stats.items() if int(fields[1]) == pid]
    return [(pid, stats[pid]) for pid in found]


def _tree_cpu_seconds() -> float:
    """User and system time of the tree, of children that ended too."""
    return sum(int(ticks) for _, fields in _tree() for ticks in fields[11:15]) / _TICKS


def _tree_memory_bytes() -> float:
    """Resident memory of the tree; a page that several processes share counts once."""
    total = 0
    for pid, _ in _tree():
        with suppress(OSError):  # it may be gone by now
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total
