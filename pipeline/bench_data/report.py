"""What the loaders of a host did, as a table, and what to change where they do not keep up."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from pipeline.bench_data.feeds import Feed
from pipeline.config.sections import ConfigError

_IDLE = 0.7  # below this share of the workers' cores, they wait for something that is not the CPU
_SLACK = 1.05  # a loader exactly as fast as the GPUs makes them wait now and then


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


def needed_by(run_folder: Path) -> float:
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


def table_of(feed: Feed, speed: HostSpeed, of_run: Path | None) -> Table:
    ranks, config = speed.ranks, feed.config
    table = Table(title=f"loader of {config.name}: {feed.how}, {config.data.resolution} px", show_header=False)
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
        table.add_row("BAD SAMPLES", f"{bad:,}: {feed.how_to_check}")
    if speed.needed is not None:
        source = f"{of_run}/log.jsonl, less its waits" if of_run else "--need"
        table.add_row("images/s needed", f"{speed.needed:,.1f} ({source})")
        times = f"{speed.images_per_second / speed.needed:.2f} times what is needed"
        table.add_row("keeps up", f"{'yes' if speed.keeps_up else 'NO'}: {times}")
        for line in [] if speed.keeps_up else advice(feed, speed):
            table.add_row("change", line)
    return table


def advice(feed: Feed, speed: HostSpeed) -> list[str]:
    """What to change so that the loader keeps up, the cheapest first."""
    ranks, found = len(speed.ranks), []
    needed = (speed.needed or 0.0) * _SLACK
    cores = math.ceil(needed / speed.images_per_cpu_second)
    workers, wanted = max(1, feed.config.data.workers_per_rank), math.ceil(cores / ranks)
    if feed.is_remote and speed.cores_busy < _IDLE * min(speed.cores, ranks * workers):
        found.append(
            "the network: cores wait. Measure for longer (--seconds 300), raise data.cache_gb, or copy the set"
        )
    elif wanted > workers and ranks * workers < speed.cores:
        found.append(f"data.workers_per_rank={min(wanted, max(1, speed.cores // ranks))}: cores are idle")
    if needed <= speed.images_per_second_at_best:
        return found or ["nothing here: other programs keep the cores busy; end them and measure again"]
    return [*found, *feed.faster(), f"{cores} cores for the ranks of a node; {speed.cores} are here"]
