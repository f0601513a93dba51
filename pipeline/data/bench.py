"""How fast the configured loader is on this host, and whether that is enough: ``python -m pipeline bench-data CONFIG``.

Each rank is a process that runs `training_batches` as a run does, and takes batches as fast as they come. What was read
ahead before the clock started is thrown away first; then images, wall time and CPU time are counted together.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from data_prep.manifest import Manifest
from pipeline.config.load import Config
from pipeline.config.sections import ConfigError
from pipeline.data.loader import training_batches
from pipeline.data.opened import training_order
from pipeline.data.ring import PREFETCHED_BATCHES
from pipeline.data.shards import DataError
from pipeline.data.stream.manifest import load_manifest
from pipeline.ranks.collectives import Ranks

_INDEXES = 32  # of so many shards the images' sizes are looked up
_IDLE = 0.7  # below this share of the workers' cores, they wait for something that is not the CPU
_SLACK = 1.05  # a loader exactly as fast as the GPUs makes them wait now and then
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class RankSpeed:
    """What one rank's loader did: bytes are those of the images' files, memory that of all its processes, bytes."""

    images: int
    seconds: float
    cpu_seconds: float
    first_batch_seconds: float
    bytes_per_image: float
    memory_bytes: float
    bad_samples: int


@dataclass(frozen=True)
class HostSpeed:
    """The loaders of some ranks at once on a host of `cores` cores; `needed` images per second, all ranks together."""

    ranks: tuple[RankSpeed, ...]
    cores: int
    needed: float | None

    @property
    def images_per_second(self) -> float:
        return sum(rank.images / rank.seconds for rank in self.ranks)

    @property
    def cores_busy(self) -> float:
        return sum(rank.cpu_seconds / rank.seconds for rank in self.ranks)

    @property
    def images_per_cpu_second(self) -> float:
        return self.images_per_second / max(self.cores_busy, 1e-9)

    @property
    def images_per_second_at_best(self) -> float:
        """With every core of the host making images."""
        return self.images_per_cpu_second * self.cores

    @property
    def keeps_up(self) -> bool | None:
        return None if self.needed is None else self.images_per_second >= self.needed * _SLACK


def run(
    config: Config, seconds: float, ranks_per_node: int | None, need: float | None, of_run: Path | None, nodes: int = 1
) -> HostSpeed:
    """Measure for `seconds`, print the table, return what is in it. Raises ConfigError, DataError, ManifestError."""
    ranks_per_node = torch.cuda.device_count() or 1 if ranks_per_node is None else ranks_per_node
    if seconds <= 0 or ranks_per_node < 1 or nodes < 1 or (need is not None and need <= 0):
        raise ConfigError("--seconds, --ranks-per-node, --nodes and --need have to be above 0")
    needed = need if of_run is None else _needed_by(of_run) / nodes
    config.train.accumulation_steps(nodes * ranks_per_node)
    manifest = load_manifest(config.data, count_val=False)
    training_order(config, manifest)
    # As under the launchers: what torch does in a rank itself takes one thread.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cores = len(os.sched_getaffinity(0))
    speed = HostSpeed(tuple(_measure(config, seconds, ranks_per_node, nodes)), cores, needed)
    Console(width=None if Console().is_terminal else 110).print(_table(config, speed, of_run))
    return speed


def _needed_by(run_folder: Path) -> float:
    """Images per second that a run's GPUs would take if they never waited: the median of its log."""
    log = run_folder / "log.jsonl"
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if "images_per_second" in line]
        found = [line["images_per_second"] / max(1 - line.get("data_wait", 0.0), 0.01) for line in steps]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--run: {log} cannot be read ({error}): name the folder of a run, or use --need") from None
    if not found:
        raise ConfigError(f"--run: {log} has no images_per_second yet: let the run log a step, or use --need")
    return statistics.median(found[1:] or found)  # the first has start-up in it


def _table(config: Config, speed: HostSpeed, of_run: Path | None) -> Table:
    ranks, data = speed.ranks, config.data
    which = f"{data.format}{', streamed' if data.reader == 'stream' else ''}"
    how = f"{which}, augment.where {config.augment.where}, workers_per_rank {data.workers_per_rank}"
    table = Table(title=f"loader of {config.name}: {how}, {data.resolution} px", show_header=False)
    seconds = statistics.mean(rank.seconds for rank in ranks)
    table.add_row("measured", f"{len(ranks)} rank(s), {seconds:.1f} s, {sum(rank.images for rank in ranks):,} images")
    table.add_row("images/s, this host", f"{speed.images_per_second:,.1f} with {speed.cores_busy:.2f} cores busy")
    table.add_row("images/s, one core", f"{speed.images_per_cpu_second:,.1f} (images per CPU-second)")
    table.add_row("images/s, all cores", f"{speed.images_per_second_at_best:,.1f}, extrapolated to {speed.cores} cores")
    table.add_row("CPU time of an image", f"{1000 / speed.images_per_cpu_second:.3f} ms")
    size = statistics.mean(rank.bytes_per_image for rank in ranks)
    table.add_row("bytes of an image", "not known of a stream" if math.isnan(size) else f"{size / 1e3:,.1f} kB")
    table.add_row("first batch after", f"{max(rank.first_batch_seconds for rank in ranks):.1f} s")
    memory = sum(rank.memory_bytes for rank in ranks) / 1e9
    table.add_row("memory", f"{memory:.2f} GB, {memory / len(ranks):.2f} a rank (libraries and mapped files count)")
    if bad := sum(rank.bad_samples for rank in ranks):
        table.add_row("BAD SAMPLES", f"{bad:,}: {data.how_to_check}")
    if speed.needed is not None:
        source = f"{of_run}/log.jsonl, less its waits" if of_run else "--need"
        table.add_row("images/s needed", f"{speed.needed:,.1f} ({source})")
        times = f"{speed.images_per_second / speed.needed:.2f} times what is needed"
        table.add_row("keeps up", f"{'yes' if speed.keeps_up else 'NO'}: {times}")
        for line in [] if speed.keeps_up else advice(config, speed):
            table.add_row("change", line)
    return table


def advice(config: Config, speed: HostSpeed) -> list[str]:
    """What to change so that the loader keeps up, the cheapest first; ratios are those of tests/bench/RESULTS.md."""
    data, ranks, found = config.data, len(speed.ranks), []
    needed = (speed.needed or 0.0) * _SLACK
    cores = math.ceil(needed / speed.images_per_cpu_second)
    workers, wanted = max(1, data.workers_per_rank), math.ceil(cores / ranks)
    if data.is_remote and speed.cores_busy < _IDLE * min(speed.cores, ranks * workers):
        found.append(
            "the network: cores wait. Measure for longer (--seconds 300), raise data.cache_gb, or copy the set"
        )
    elif wanted > workers and ranks * workers < speed.cores:
        found.append(f"data.workers_per_rank={min(wanted, max(1, speed.cores // ranks))}: cores are idle")
    if needed <= speed.images_per_second_at_best:
        return found or ["nothing here: other programs keep the cores busy; end them and measure again"]
    if config.augment.where == "host":
        found.append("augment.where=device: a third to a fifth of the host's work is left, the GPU does the rest")
    elif data.reader == "stream":
        found.append("data.reader=indexed, where the shards can be indexed: tars are parsed once, not in every epoch")
    elif data.format == "ffcv":
        found.append("data.format=webdataset: of JPEG files 1.7 times as fast as FFCV")
    elif not data.is_remote:
        found.append(
            "data.format=ffcv of pixels (shard --format ffcv --beton-mode raw): 1.1 to 1.2 times as fast, many GB more"
        )
    size = f"now {speed.ranks[0].bytes_per_image / 1e3:.0f} kB each"
    found.append(f"smaller images, where they are larger ({size}): shard --short-side {round(data.resolution * 4 / 3)}")
    return [*found, f"{cores} cores for the ranks of a node; {speed.cores} are here"]


def _measure(config: Config, seconds: float, ranks: int, nodes: int) -> list[RankSpeed]:
    context = get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(target=_rank, args=(there, os.getpid(), config, rank, nodes * ranks, seconds))
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


def _rank(pipe: Any, parent: int, config: Config, rank: int, ranks: int, seconds: float) -> None:
    """A rank's process: sends ("ready", None), waits for a word, then sends ("tick", ...) and ("done", RankSpeed)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends this one
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    try:
        _run_rank(pipe, config, rank, ranks, seconds)
    except ValueError as error:
        pipe.send(("error", DataError(" ".join(str(error).split()))))


def _run_rank(pipe: Any, config: Config, rank: int, ranks: int, seconds: float) -> None:
    data, manifest = config.data, load_manifest(config.data, count_val=False)
    order = training_order(config, manifest)
    first_step = max(data.resolution_by_epoch or {0: 0}) * order.steps_per_epoch  # the largest images
    begun = time.monotonic()
    batches = training_batches(config, manifest, order, Ranks(rank, ranks), first_step, 1 << 40)
    next(batches)
    first_batch_seconds = time.monotonic() - begun
    pipe.send(("ready", None))
    pipe.recv()
    processes = data.workers_per_rank if data.format == "webdataset" and config.augment.where == "host" else 1
    for _ in range(PREFETCHED_BATCHES * (max(1, processes) + 1)):
        next(batches)
    images, bad, samples = 0, 0, []
    cpu_begun, begun = _tree_cpu_seconds(), time.monotonic()
    told, told_images = begun, 0
    while time.monotonic() < begun + seconds:
        batch = next(batches)
        images, bad = images + len(batch.labels), bad + len(batch.bad)
        samples.append(batch.samples.numpy())
        now = time.monotonic()
        if now - told > 0.5:
            pipe.send(("tick", (now - told, images - told_images)))
            told, told_images = now, images
    elapsed, cpu_seconds = time.monotonic() - begun, _tree_cpu_seconds() - cpu_begun
    size = _bytes_per_image(config, manifest, np.concatenate(samples))
    speed = RankSpeed(images, elapsed, cpu_seconds, first_batch_seconds, size, _tree_memory_bytes(), bad)
    pipe.send(("done", speed))


def _bytes_per_image(config: Config, manifest: Manifest, samples: np.ndarray) -> float:
    split = manifest.split("train")
    if config.data.format == "ffcv":
        return split.betons[0].bytes / split.betons[0].samples
    if config.data.reader == "stream" or len(config.data.sets) > 1:  # with all else that is in its tars
        return sum(entry.bytes for entry in split.shards) / split.samples or math.nan
    ends = np.cumsum([entry.samples for entry in split.shards])
    shards = np.searchsorted(ends, samples, side="right")
    sizes = []
    for shard in np.unique(shards)[:_INDEXES].tolist():
        index = manifest.load_index(config.data.folder, split.shards[shard])
        sizes.append(index.sizes[samples[shards == shard] - (ends[shard] - split.shards[shard].samples)])
    return float(np.concatenate(sizes).mean())


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
