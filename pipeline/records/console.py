"""What a person reads while a run goes on: the tables at its start and end, a line a step."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.credentials import without_credentials
from data_prep.manifest import Manifest
from pipeline.config.load import Config
from pipeline.config.run import RunConfig
from pipeline.config.sections import Guard
from pipeline.data.order import validation_samples
from pipeline.ranks.log_file import say
from pipeline.records.address import database_file, is_default, tracking_uri


def print_summary(config: RunConfig, summary: dict[str, Any], page: str | None) -> None:
    """The table at the end of a run: what happened, where it is, what to type next. `page` is its address in MLflow."""
    table = Table(title=f"{summary['stage']} {summary['name']}: done", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut is of no use
    if "top1" in summary:
        accuracy = f"{summary['top1']:.2f} % / {summary['top5']:.2f} % of {summary['val_samples']:.0f}"
        table.add_row("top-1 / top-5", accuracy)
    if "miou" in summary:
        table.add_row("mIoU", f"{summary['miou']:.2f} % of {summary['val_samples']:.0f} images")
    if "box_ap" in summary:
        masks = f", of masks {summary['mask_ap']:.2f} %" if "mask_ap" in summary else ""
        table.add_row("AP of boxes", f"{summary['box_ap']:.2f} %{masks}, of {summary['val_samples']:.0f} images")
    table.add_row("images seen", f"{summary['samples_seen']:,}")
    table.add_row("time", f"{summary['seconds'] / 60:.1f} min")
    table.add_row("checkpoint", summary["checkpoint"])
    table.add_row("log", str(config.run_dir / "log.jsonl"))
    table.add_row("MLflow run", summary["mlflow_run_id"] or "not reached")
    review = _review(config)
    if summary["stage"] in ("finetune", "segment", "detect"):
        table.add_row("next", review)
    elif config.name == "demo-pretrain":
        table.add_row("next", f"make finetune    then: {review}")
    else:
        table.add_row("next", f'make finetune CONFIG=... ARGS="init.checkpoint={config.run_dir}"    then: {review}')
    _show(table, 100)
    if page is not None:  # apart from the table, which would break the line
        first = "" if database_file(tracking_uri(config)) is None else f" (after `{_review(config)}`)"
        say(f"MLflow{first}: {page}", sys.stdout)


def _review(config: RunConfig) -> str:
    """What shows the run: a command for a database file, else where MLflow is."""
    uri = tracking_uri(config)
    if database_file(uri) is None:
        return f"the runs at {without_credentials(uri)}"
    return "make review" if is_default(config) else f"make review RUN={config.run_dir}"


def print_plan(
    command: str, config: RunConfig, subject: Mapping[str, str], steps: int, ranks: int, device: str, origin: str
) -> None:
    """The table at the start of a run: what will be trained on what, how, from where. `subject`: its first rows."""
    table = Table(title=f"{command} {config.name}", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, text in subject.items():
        table.add_row(name, text)
    accumulation = config.train.accumulation_steps(ranks)
    table.add_row(
        "batch",
        f"{config.train.global_batch} = {ranks} ranks x {config.train.micro_batch} images x {accumulation} accumulated",
    )
    table.add_row("length", f"{config.train.epochs} epochs, {steps:,} steps")
    table.add_row(
        "engine",
        f"DeepSpeed ZeRO-{config.train.zero_stage}, {device}, checkpointing {_policy(config.model.checkpointing)}"
        + (", compiled blocks" if config.model.compile else "")
        + (", CUDA graphs" if config.model.cuda_graphs else ""),
    )
    table.add_row("guard", _guard_row(config.guard))
    table.add_row("weights", origin)
    table.add_row("run folder", str(config.run_dir))
    _show(table, 140)


def classification_rows(config: Config, manifest: Manifest, parameters: int) -> dict[str, str]:
    """The first rows of the table at the start, of a classification."""
    images, classes = manifest.split("train").samples, manifest.num_classes
    return {
        "model": f"{config.model.name}, {parameters / 1e6:.2f} M parameters, {config.data.resolution} px",
        "data": f"{manifest.name} ({config.data.format}): {images:,} training images, {classes:,} classes",
        "validation": validation_row(validation_samples(config, manifest), config.evaluate.every_epochs),
    }


def validation_row(images: int, every_epochs: int | None) -> str:
    """How many images are measured on, and when."""
    if not images:
        return "none (evaluate.every_epochs is null)"
    when = "each epoch" if every_epochs == 1 else f"every {every_epochs} epochs and at the end"
    return f"{images:,} images, {when}"


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


def evaluation_line(done: int, metrics: Mapping[str, float]) -> str:
    """One console line of an evaluation of a classification."""
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
