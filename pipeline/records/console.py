"""What a person reads while a run goes on: the tables at its start and end, a line a step, and the meter behind it."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data_prep.credentials import without_credentials
from data_prep.manifest import Manifest
from pipeline.config.load import Config
from pipeline.config.sections import Guard
from pipeline.data.order import validation_samples
from pipeline.ranks.collectives import Ranks
from pipeline.ranks.log_file import say
from pipeline.records.address import is_default, tracking_uri
from pipeline.records.review_address import review_base

Reduction = Callable[[torch.Tensor], torch.Tensor]


class Meter:
    """Loss, throughput, memory and time spent waiting for data, between two reads."""

    def __init__(
        self,
        global_batch: int,
        ranks: Ranks,
        device: torch.device,
        reduce_sum: Reduction,
        reduce_max: Reduction,
        flops_per_image: Callable[[int], float] | None,
        peak_flops: float | None,
    ) -> None:
        """`reduce_*` are all-reductions of a small float64 tensor on `device`.

        `flops_per_image` takes the side of an image in pixels and gives the FLOPs of its part of a training step,
        forward and backward; `peak_flops` is the FLOP/s of one device. Without either there is no MFU.
        """
        self.global_batch, self.ranks, self.device = global_batch, ranks, device
        self.reduce_sum, self.reduce_max = reduce_sum, reduce_max
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self._restart()

    def _restart(self) -> None:
        self._loss = self._flops = 0.0
        self._steps = self._steps_with_loss = 0
        self._waited = self._paused = 0.0
        self._since = time.monotonic()

    def add(self, loss: float, resolution: int) -> None:
        """Count a step on images of `resolution` pixels, and its loss: the mean over ranks, finite or not."""
        self._loss += loss
        self._steps_with_loss += 1
        self._count(resolution)

    def skip(self, resolution: int) -> None:
        """Count a step whose update was left out: it took its time, and its loss is no part of the mean."""
        self._count(resolution)

    def _count(self, resolution: int) -> None:
        self._steps += 1
        if self.flops_per_image is not None and self.peak_flops is not None:
            self._flops += self.global_batch * self.flops_per_image(resolution)

    def waiting(self) -> _Stopwatch:
        """Time inside counts as waiting for data."""
        return _Stopwatch(self, "_waited")

    def paused(self) -> _Stopwatch:
        """Time inside (evaluation, checkpoints) does not count for throughput."""
        return _Stopwatch(self, "_paused")

    def read(self, done: int, bad_samples: int) -> dict[str, float]:
        """What was measured since the last read. Two reductions: all ranks must call it.

        `bad_samples` is this rank's count, in the result it is the sum over ranks. `loss` is nan without a step that
        had one. `data_wait` is a share of the time, the mean over ranks; `data_wait_max` that of the slowest rank.
        `memory_gb` (10^9 bytes) is the largest of the ranks: what torch had allocated on a GPU at its peak since the
        last read, and on a CPU the process at its peak so far. `mfu` is a share of `peak_flops`, if that is known.
        """
        elapsed = max(time.monotonic() - self._since - self._paused, 1e-9)
        waited = self._waited / elapsed
        sums = torch.tensor([waited, bad_samples], dtype=torch.float64, device=self.device)
        peaks = torch.tensor([waited, _peak_memory_gb(self.device)], dtype=torch.float64, device=self.device)
        waited_sum, bad_sum = self.reduce_sum(sums).tolist()
        waited_max, memory_gb = self.reduce_max(peaks).tolist()
        metrics = {
            "loss": self._loss / self._steps_with_loss if self._steps_with_loss else math.nan,
            "samples_seen": done * self.global_batch,
            "images_per_second": self._steps * self.global_batch / elapsed,
            "data_wait": waited_sum / self.ranks.count,
            "data_wait_max": waited_max,
            "bad_samples": bad_sum,
            "memory_gb": memory_gb,
        }
        if self.flops_per_image is not None and self.peak_flops is not None:
            metrics["mfu"] = self._flops / elapsed / self.ranks.count / self.peak_flops
        self._restart()
        return metrics


class _Stopwatch:
    def __init__(self, meter: Meter, field: str) -> None:
        self.meter, self.field = meter, field

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        spent = time.monotonic() - self.started
        setattr(self.meter, self.field, getattr(self.meter, self.field) + spent)


def _peak_memory_gb(device: torch.device) -> float:
    """10^9 bytes; on a GPU the next peak is counted from now on."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class Eta:
    """Seconds that a run still takes, from its last windows of steps, of which the newest weigh most.

    Every window counts once, however many steps it had: so what a run took before it was interrupted can be added as
    one window, and is forgotten as the new machine shows its own speed. A window far slower than is typical (a
    compilation, a stalled file system) counts as `_OUTLIER` times the typical.
    """

    _WINDOWS, _HALF_LIFE, _OUTLIER = 50, 8, 3.0

    def __init__(self) -> None:
        self._seconds_per_step: deque[float] = deque(maxlen=self._WINDOWS)

    def add(self, steps: int, seconds: float) -> None:
        """A window of `steps` that took `seconds`; one without steps is no window."""
        if steps > 0:
            self._seconds_per_step.append(seconds / steps)

    def left(self, steps_left: int) -> float:
        """Seconds for `steps_left` more steps; nan before the first window."""
        if not self._seconds_per_step:
            return math.nan
        newest = len(self._seconds_per_step) - 1
        weighted = sorted(
            (seconds, 0.5 ** ((newest - i) / self._HALF_LIFE)) for i, seconds in enumerate(self._seconds_per_step)
        )
        total = sum(weight for _, weight in weighted)
        up_to = accumulate(weight for _, weight in weighted)
        median = next(seconds for (seconds, _), below in zip(weighted, up_to, strict=True) if below >= total / 2)
        bound = self._OUTLIER * median
        return steps_left * sum(min(seconds, bound) * weight for seconds, weight in weighted) / total


def print_summary(config: Config, summary: dict[str, Any], page: str | None) -> None:
    """The table at the end of a run: what happened, where it is, what to type next. `page` is its address in MLflow."""
    table = Table(title=f"{summary['stage']} {summary['name']}: done", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut is of no use
    if "top1" in summary:
        accuracy = f"{summary['top1']:.2f} % / {summary['top5']:.2f} % of {summary['val_samples']:.0f}"
        table.add_row("top-1 / top-5", accuracy)
    table.add_row("images seen", f"{summary['samples_seen']:,}")
    table.add_row("time", f"{summary['seconds'] / 60:.1f} min")
    table.add_row("checkpoint", summary["checkpoint"])
    table.add_row("log", str(config.run_dir / "log.jsonl"))
    table.add_row("MLflow run", summary["mlflow_run_id"] or "not reached")
    review = "make review" if is_default(config) else f"the runs at {without_credentials(tracking_uri(config))}"
    if summary["stage"] == "finetune":
        table.add_row("next", review)
    elif config.name == "demo-pretrain":
        table.add_row("next", f"make finetune    then: {review}")
    else:
        table.add_row("next", f'make finetune CONFIG=... ARGS="init.checkpoint={config.run_dir}"    then: {review}')
    _show(table, 100)
    if page is not None:  # apart from the table, which would break the line
        say(f"MLflow{' (after `make review`)' if page.startswith(review_base()) else ''}: {page}", sys.stdout)


def print_plan(
    command: str,
    config: Config,
    manifest: Manifest,
    steps: int,
    ranks: int,
    parameters: int,
    device: str,
    origin: str,
) -> None:
    """The table at the start of a run: what will be trained on what, how, from where."""
    validation, every = validation_samples(config, manifest), config.evaluate.every_epochs
    table = Table(title=f"{command} {config.name}", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("model", f"{config.model.name}, {parameters / 1e6:.2f} M parameters, {config.data.resolution} px")
    table.add_row(
        "data",
        f"{manifest.name} ({config.data.format}): {manifest.split('train').samples:,} training images, "
        f"{manifest.num_classes:,} classes",
    )
    table.add_row(
        "validation",
        f"{validation:,} images, {'each epoch' if every == 1 else f'every {every} epochs and at the end'}"
        if validation
        else "none (evaluate.every_epochs is null)",
    )
    accumulation = config.train.accumulation_steps(ranks)
    table.add_row(
        "batch",
        f"{config.train.global_batch} = {ranks} ranks x {config.train.micro_batch} images x {accumulation} accumulated",
    )
    table.add_row("length", f"{config.train.epochs} epochs, {steps:,} steps")
    table.add_row(
        "engine",
        f"DeepSpeed ZeRO-{config.train.zero_stage}, {device}, checkpointing {_policy(config.model.checkpointing)}"
        + (", compiled blocks" if config.model.compile else ""),
    )
    table.add_row("guard", _guard_row(config.guard))
    table.add_row("weights", origin)
    table.add_row("run folder", str(config.run_dir))
    _show(table, 140)


def _show(table: Table, width: int) -> None:
    """Print a table, as wide as the terminal or, where there is none, `width` columns."""
    console = Console(width=None if Console().is_terminal else width)
    with console.capture() as captured:
        console.print(table)
    say(captured.get().rstrip("\n"), sys.stdout)


def _policy(checkpointing: str | tuple[str, ...]) -> str:
    return checkpointing if isinstance(checkpointing, str) else "/".join(checkpointing)


def _guard_row(guard: Guard) -> str:
    stall = f"the run ends after {guard.stall_seconds:g} s without progress"
    if guard.mode == "off":
        return f"off, but after {guard.steps_in_a_row} updates in a row that are not finite the run ends; {stall}"
    then = f"at most {guard.rewinds_max} rewinds" if guard.mode == "rewind" else "the run ends"
    return (
        f"{guard.mode}: no update beyond {guard.z_max:g} deviations of the last {guard.window_steps} steps; "
        f"after {guard.steps_in_a_row} in a row {then}; {stall}"
    )


# What should be nonzero in no run: the key in the log, and how the console says it.
_LOUD = (
    ("bad_samples", "BAD SAMPLES"),
    ("skipped_steps", "SKIPPED UPDATES"),
    ("rewinds", "REWINDS"),
    ("checkpoints_failed", "CHECKPOINTS NOT WRITTEN"),
)


def step_line(done: int, steps: int, logged: Mapping[str, float], seconds_left: float) -> str:
    """One console line of a logged step."""
    parts = [
        f"step {done:>{len(str(steps))}}/{steps}",
        f"ETA {_duration(seconds_left)}",
        f"epoch {logged['epoch']:.2f}",
        f"loss {logged['loss']:.4f}",
        f"lr {logged['lr']:.2e}",
        f"grad {logged['grad_norm']:.2f}",
        f"{logged['images_per_second']:.0f} images/s",
    ]
    if "mfu" in logged:
        parts.append(f"MFU {logged['mfu']:.1%}")
    wait, wait_max = f"{logged['data_wait']:.0%}", f"{logged['data_wait_max']:.0%}"
    parts.append(f"data wait {wait}" + (f" (slowest rank {wait_max})" if wait_max != wait else ""))
    parts.append(f"{logged['memory_gb']:.1f} GB")
    parts += [f"{name} {logged[key]:.0f}" for key, name in _LOUD if logged.get(key)]
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    """3:04:05, over a day "2 d 03:10", and "?" where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}"


def evaluation_line(done: int, metrics: dict[str, float]) -> str:
    """One console line of an evaluation."""
    raw = f" (without EMA {metrics['top1_model']:.2f})" if "top1_model" in metrics else ""
    return (
        f"step {done}  validation: top-1 {metrics['top1']:.2f} %{raw}  top-5 {metrics['top5']:.2f} %  "
        f"loss {metrics['val_loss']:.4f}  {metrics['val_samples']:.0f} images"
    )


def interrupted_line(done: int, steps: int, reason: str, checkpoint: Path | None) -> str:
    """The last console line of a run that was asked to stop; `reason` is the signal's name."""
    left = f"checkpoint {checkpoint}; the same command goes on"
    if checkpoint is None:
        left = "no checkpoint was written; the same command goes on from the newest there is"
    return f"stopped ({reason}) with {steps - done} of {steps} steps to go: {left}"
