"""What a person reads while a run goes on: the tables at its start and end, a line a step, and the meter behind it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data_prep.manifest import Manifest
from pipeline.config import Config


class Meter:
    """Loss, throughput and time spent waiting for data, between two reads."""

    def __init__(self, global_batch: int, ranks: int, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.global_batch, self.ranks, self.sum_over_ranks = global_batch, ranks, sum_over_ranks
        self._restart()

    def _restart(self) -> None:
        self._loss: torch.Tensor | float = 0.0
        self._steps = 0
        self._waited = self._paused = 0.0
        self._since = time.monotonic()

    def add(self, loss: torch.Tensor) -> None:
        """Count a step and its loss, which stays on the device."""
        self._loss = self._loss + loss
        self._steps += 1

    def waiting(self) -> _Stopwatch:
        """Time inside counts as waiting for data."""
        return _Stopwatch(self, "_waited")

    def paused(self) -> _Stopwatch:
        """Time inside (evaluation, checkpoints) does not count for throughput."""
        return _Stopwatch(self, "_paused")

    def read(self, steps_done: int, bad_samples: int) -> dict[str, float]:
        """The means since the last read; the one reduction and host read of a logged step. All ranks must call it.

        `bad_samples` is this rank's count; the sum over ranks is returned.
        """
        assert isinstance(self._loss, torch.Tensor)
        loss, bad = self.sum_over_ranks(torch.stack([self._loss.float(), self._loss.new_tensor(bad_samples)])).tolist()
        loss = loss / self.ranks / self._steps
        elapsed = time.monotonic() - self._since - self._paused
        metrics = {
            "loss": loss,
            "samples_seen": steps_done * self.global_batch,
            "images_per_second": self._steps * self.global_batch / elapsed,
            "data_wait": self._waited / elapsed,
            "bad_samples": bad,
        }
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


def print_summary(config: Config, summary: dict[str, Any]) -> None:
    """The table at the end of a run: what happened, where it is, what to type next."""
    table = Table(title=f"{summary['stage']} {summary['name']}: done", show_header=False)
    table.add_row("top-1 / top-5", f"{summary['top1']:.2f} % / {summary['top5']:.2f} % of {summary['val_samples']:.0f}")
    table.add_row("images seen", f"{summary['samples_seen']:,}")
    table.add_row("time", f"{summary['seconds'] / 60:.1f} min")
    table.add_row("checkpoint", summary["checkpoint"])
    table.add_row("log", str(config.run_dir / "log.jsonl"))
    table.add_row("MLflow run", summary["mlflow_run_id"] or "not reached")
    review = "make review" if config.tracking.uri is None else f"the runs at {config.tracking.uri}"
    if summary["stage"] == "finetune":
        table.add_row("next", review)
    elif config.name == "demo-pretrain":
        table.add_row("next", f"make finetune    then: {review}")
    else:
        table.add_row("next", f'make finetune CONFIG=... ARGS="init.checkpoint={config.run_dir}"    then: {review}')
    Console(width=None if Console().is_terminal else 100).print(table)


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
    train_split, val_split = manifest.split("train"), manifest.split("val")
    table = Table(title=f"{command} {config.name}", show_header=False)
    table.add_row("model", f"{config.model.name}, {parameters / 1e6:.2f} M parameters, {config.data.resolution} px")
    table.add_row(
        "data",
        f"{manifest.name} ({config.data.format}): {train_split.samples:,} training and {val_split.samples:,} "
        f"validation images, {manifest.num_classes:,} classes",
    )
    accumulation = config.train.accumulation_steps(ranks)
    table.add_row(
        "batch",
        f"{config.train.global_batch} = {ranks} ranks x {config.train.micro_batch} images x {accumulation} accumulated",
    )
    table.add_row("length", f"{config.train.epochs} epochs, {steps:,} steps")
    table.add_row(
        "engine",
        f"DeepSpeed ZeRO-{config.train.zero_stage}, {device}, checkpointing {config.model.activation_checkpointing}",
    )
    table.add_row("weights", origin)
    table.add_row("run folder", str(config.run_dir))
    Console(width=None if Console().is_terminal else 140).print(table)


def step_line(done: int, steps: int, logged: dict[str, float], seconds_per_step: float) -> str:
    """One console line of a logged step."""
    minutes, seconds = divmod(int((steps - done) * seconds_per_step), 60)
    return (
        f"step {done:>{len(str(steps))}}/{steps}  epoch {logged['epoch']:6.2f}  loss {logged['loss']:.4f}  "
        f"lr {logged['lr']:.2e}  grad {logged['grad_norm']:.2f}  {logged['images_per_second']:.0f} images/s  "
        f"waiting for data {logged['data_wait']:.0%}  ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}"
        + (f"  BAD SAMPLES {logged['bad_samples']:.0f}" if logged["bad_samples"] else "")
        + (f"  SKIPPED UPDATES {logged['skipped_steps']:.0f}" if logged["skipped_steps"] else "")
    )


def evaluation_line(done: int, metrics: dict[str, float]) -> str:
    """One console line of an evaluation."""
    raw = f" (without EMA {metrics['top1_model']:.2f})" if "top1_model" in metrics else ""
    return (
        f"step {done}  validation: top-1 {metrics['top1']:.2f} %{raw}  top-5 {metrics['top5']:.2f} %  "
        f"loss {metrics['val_loss']:.4f}  {metrics['val_samples']:.0f} images"
    )
