"""The run, top to bottom: pretraining and fine-tuning are the same code with another configuration."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_prep.manifest import Manifest, atomic_write
from pipeline import checkpoint, engine, transfer
from pipeline.config import Config
from pipeline.data.loader import Batch, Ranks, training_batches, validation_batches
from pipeline.data.order import SampleOrder
from pipeline.evaluate import evaluate
from pipeline.lifetime import exclusive, leave_with_launcher
from pipeline.recipe import Mixing, build_model, mixing_and_loss, optimizer, parameter_groups, schedule
from pipeline.tracking import Tracker

CONFIG_FILE, LOG_FILE, SUMMARY_FILE = "config.yaml", "log.jsonl", "summary.json"


def main(command: str, config: Config, resume: bool) -> None:
    """Run `command` (pretrain or finetune) on the ranks that the launcher started, from the newest checkpoint if any.

    Raises ConfigError, ManifestError, DataError, CheckpointError or RunBusyError for what a user can mend.
    """
    leave_with_launcher()
    ranks, device = engine.start_ranks()
    try:
        with ExitStack() as stack:
            if ranks.rank == 0:
                stack.enter_context(exclusive(config.run_dir))
            engine.barrier()
            train(command, config, ranks, device, resume)
    finally:
        engine.stop_ranks()


def train(command: str, config: Config, ranks: Ranks, device: torch.device, resume: bool) -> None:
    """Train, evaluate, checkpoint and log one run; see the module's docstring for the order of things."""
    manifest = Manifest.load(config.data.path)
    order = SampleOrder(manifest.split("train").samples, config.train.global_batch, config.seed)
    steps = order.steps_per_epoch * config.train.epochs
    accumulation = config.train.accumulation_steps(ranks.count)

    # Weights: the run's own newest checkpoint, else the configured start, else random.
    torch.manual_seed(config.seed)
    model = build_model(config.model, manifest.num_classes, config.data.resolution)
    twin = build_model(config.model, manifest.num_classes, config.data.resolution)  # holds full weights to evaluate
    last, meta = _newest_checkpoint(config, manifest, resume)
    origin = "random weights"
    if last is not None and meta is not None:
        model.load_state_dict(checkpoint.read_tensors(last / "model.safetensors"))
        origin = f"resumed from {last}"
    elif config.init.checkpoint is not None:
        origin = transfer.load_into(model, transfer.find_source(config.init), manifest.synsets)
    first_step = meta.step if meta else 0
    seconds_before = meta.seconds if meta else 0.0

    adamw = optimizer(parameter_groups(model, config.optimizer), config)
    deepspeed_engine = engine.Engine(config, model, adamw, ranks, device)
    if last is not None:
        deepspeed_engine.load_state(checkpoint.read_optimizer(last), first_step)
    rates = schedule(deepspeed_engine.optimizer, config.optimizer, order.steps_per_epoch, steps)
    mix, loss = mixing_and_loss(config.augment, manifest.num_classes)

    tracker = None
    if ranks.rank == 0:
        (config.run_dir / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        tags = {"stage": command, "dataset": manifest.name, "dataset_id": manifest.dataset_id, "origin": origin}
        tracker = Tracker(config, tags, first_step)
        _print_plan(command, config, manifest, deepspeed_engine, steps, accumulation, origin)
    engine.barrier()

    batches = training_batches(config, manifest, order, ranks, first_step, steps)
    started = time.monotonic()
    metrics: dict[str, float] = dict(meta.metrics) if meta else {}
    meter = _Meter(config.train.global_batch)

    for step in range(first_step, steps):
        rates.step_update(step)
        prepared = _micro_batches(batches, meter, mix, config, ranks, device, step, accumulation)
        result = deepspeed_engine.train_step(prepared, loss)
        meter.add(result.loss)
        done = step + 1
        seconds = seconds_before + time.monotonic() - started

        if done % config.tracking.log_every_steps == 0 or done == steps:
            logged = meter.read(ranks, done)
            logged["epoch"] = done / order.steps_per_epoch
            logged["lr"] = max(group["lr"] for group in deepspeed_engine.optimizer.param_groups)
            logged["grad_norm"] = float(result.grad_norm)
            if tracker:
                tracker.log(done, logged, _step_line(done, steps, logged, seconds / done))
            if not math.isfinite(logged["loss"]):
                raise FloatingPointError(f"loss is {logged['loss']} at step {done}; the last checkpoint is kept")

        epoch_ends = done % order.steps_per_epoch == 0
        if done == steps or (epoch_ends and done // order.steps_per_epoch % config.evaluate.every_epochs == 0):
            with meter.paused():
                metrics = _evaluate(deepspeed_engine, twin, config, manifest, ranks, device)
            if tracker:
                tracker.log(done, metrics, _evaluation_line(done, metrics))

        if done % config.checkpoint.every_steps == 0 or done == steps:
            with meter.paused():
                state = checkpoint.Meta(
                    step=done,
                    samples_seen=done * config.train.global_batch,
                    seconds=seconds,
                    num_classes=manifest.num_classes,
                    synsets=manifest.synsets,
                    dataset_id=manifest.dataset_id,
                    metrics=metrics,
                    config=config.model_dump(mode="json"),
                )
                folder = config.run_dir / "checkpoints"
                last = checkpoint.save(folder, deepspeed_engine, state, config.checkpoint.keep_last)
                engine.barrier()

    if tracker:
        seconds = seconds_before + time.monotonic() - started
        summary = {
            "name": config.name,
            "stage": command,
            **metrics,
            "samples_seen": steps * config.train.global_batch,
            "seconds": round(seconds, 1),
            "mlflow_run_id": tracker.run_id,
            "checkpoint": str(last),
            "dataset_id": manifest.dataset_id,
        }
        with atomic_write(config.run_dir / SUMMARY_FILE) as file:
            file.write(json.dumps(summary, indent=1).encode())
        files = [config.run_dir / name for name in (CONFIG_FILE, LOG_FILE, SUMMARY_FILE)]
        tracker.finish("FINISHED", [*files, config.data.path / "dataset.json"])
        print_summary(config, summary)


def preflight(config: Config, ranks: int | None, resume: bool) -> None:
    """Check, without a process group, what `train` would trip over on every rank. Raises the same errors.

    `ranks` is their number where it is known before the launch.
    """
    from pipeline.data.beton import beton_path
    from pipeline.data.shards import ShardImages

    manifest = Manifest.load(config.data.path)
    SampleOrder(manifest.split("train").samples, config.train.global_batch, config.seed)
    if ranks is not None:
        config.train.accumulation_steps(ranks)
    for split in ("train", "val"):
        if config.data.format == "ffcv":
            beton_path(config.data.path, manifest, split)
        else:
            ShardImages(config.data.path, manifest, split)
    with torch.device("meta"):
        build_model(config.model, manifest.num_classes, config.data.resolution)
    last, _ = _newest_checkpoint(config, manifest, resume)
    if last is None and config.init.checkpoint is not None:
        transfer.check_model(transfer.find_source(config.init), config.model.name)


def print_summary(config: Config, summary: dict[str, Any]) -> None:
    """The table at the end of a run: what happened, where it is, what to type next."""
    table = Table(title=f"{summary['stage']} {summary['name']}: done", show_header=False)
    table.add_row("top-1 / top-5", f"{summary['top1']:.2f} % / {summary['top5']:.2f} % of {summary['val_samples']:.0f}")
    table.add_row("images seen", f"{summary['samples_seen']:,}")
    table.add_row("time", f"{summary['seconds'] / 60:.1f} min")
    table.add_row("checkpoint", summary["checkpoint"])
    table.add_row("log", str(config.run_dir / LOG_FILE))
    table.add_row("MLflow run", summary["mlflow_run_id"] or "not reached")
    following = {"pretrain": "make finetune    then: make review", "finetune": "make review"}
    table.add_row("next", following[summary["stage"]])
    Console(width=None if Console().is_terminal else 100).print(table)


def _newest_checkpoint(
    config: Config, manifest: Manifest, resume: bool
) -> tuple[Path, checkpoint.Meta] | tuple[None, None]:
    """The checkpoint this run goes on from. Raises CheckpointError if it is another run's, or not to be resumed."""
    last = checkpoint.newest(config.run_dir / "checkpoints")
    if last is None:
        return None, None
    if not resume:
        raise checkpoint.CheckpointError(
            f"{config.run_dir} already holds a run ({last.name}): leave out --resume never to continue it, "
            f"set another name, or remove the folder"
        )
    meta = checkpoint.read_meta(last)
    checkpoint.check_same_run(last, meta, config, manifest.dataset_id)
    return last, meta


def _micro_batches(
    batches: Iterator[Batch],
    meter: _Meter,
    mix: Mixing,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    step: int,
    accumulation: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(images, targets) on the device for one optimizer step of this rank, with all random state keyed by position."""
    for micro in range(accumulation):
        with meter.waiting():
            images, labels, _ = next(batches)
        slot = (ranks.rank * accumulation + micro) * config.train.micro_batch
        key = (config.seed, step, slot)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))  # drop path and dropout
        yield mix(images.to(device, non_blocking=True), labels.to(device, non_blocking=True), key)


def _evaluate(
    deepspeed_engine: engine.Engine,
    twin: torch.nn.Module,
    config: Config,
    manifest: Manifest,
    ranks: Ranks,
    device: torch.device,
) -> dict[str, float]:
    """Accuracy of the EMA where there is one (and of the raw weights as `top1_model`), else of the weights."""
    results = {}
    for state in ("model", *(["ema"] if "ema" in deepspeed_engine.state_names else [])):
        twin.load_state_dict(deepspeed_engine.full_state(state, everywhere=True))
        batches = validation_batches(config, manifest, ranks)
        results[state] = evaluate(twin.to(device), batches, device, deepspeed_engine.bf16, engine.sum_over_ranks)
        twin.to("cpu")
    if "ema" not in results:
        return results["model"]
    return {**results["ema"], "top1_model": results["model"]["top1"]}


class _Meter:
    """Loss, throughput and time spent waiting for data, between two reads."""

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
        self._restart()

    def _restart(self) -> None:
        self._loss: torch.Tensor | float = 0.0
        self._steps = 0
        self._waited = self._paused = 0.0
        self._since = time.monotonic()

    def add(self, loss: torch.Tensor) -> None:
        self._loss = self._loss + loss
        self._steps += 1

    def waiting(self) -> _Stopwatch:
        return _Stopwatch(self, "_waited")

    def paused(self) -> _Stopwatch:
        return _Stopwatch(self, "_paused")

    def read(self, ranks: Ranks, steps_done: int) -> dict[str, float]:
        """The means since the last read; the one reduction and host read of a logged step. All ranks must call it."""
        assert isinstance(self._loss, torch.Tensor)
        loss = float(engine.sum_over_ranks(self._loss)) / ranks.count / self._steps
        elapsed = time.monotonic() - self._since - self._paused
        metrics = {
            "loss": loss,
            "samples_seen": steps_done * self.global_batch,
            "images_per_second": self._steps * self.global_batch / elapsed,
            "data_wait": self._waited / elapsed,
        }
        self._restart()
        return metrics


class _Stopwatch:
    def __init__(self, meter: _Meter, field: str) -> None:
        self.meter, self.field = meter, field

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        spent = time.monotonic() - self.started
        setattr(self.meter, self.field, getattr(self.meter, self.field) + spent)


def _print_plan(
    command: str,
    config: Config,
    manifest: Manifest,
    deepspeed_engine: engine.Engine,
    steps: int,
    accumulation: int,
    origin: str,
) -> None:
    train_split, val_split = manifest.split("train"), manifest.split("val")
    parameters = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in deepspeed_engine.engine.module.parameters())
    table = Table(title=f"{command} {config.name}", show_header=False)
    table.add_row("model", f"{config.model.name}, {parameters / 1e6:.2f} M parameters, {config.data.resolution} px")
    table.add_row(
        "data",
        f"{manifest.name} ({config.data.format}): {train_split.samples:,} training and {val_split.samples:,} "
        f"validation images, {manifest.num_classes:,} classes",
    )
    ranks = deepspeed_engine.ranks.count
    table.add_row(
        "batch",
        f"{config.train.global_batch} = {ranks} ranks x {config.train.micro_batch} images x {accumulation} accumulated",
    )
    table.add_row("length", f"{config.train.epochs} epochs, {steps:,} steps")
    table.add_row(
        "engine",
        f"DeepSpeed ZeRO-{config.train.zero_stage}, {'bf16 autocast' if deepspeed_engine.bf16 else 'fp32'}, "
        f"{deepspeed_engine.device.type}, checkpointing {config.model.activation_checkpointing}",
    )
    table.add_row("weights", origin)
    table.add_row("run folder", str(config.run_dir))
    Console(width=None if Console().is_terminal else 140).print(table)


def _step_line(done: int, steps: int, logged: dict[str, float], seconds_per_step: float) -> str:
    minutes, seconds = divmod(int((steps - done) * seconds_per_step), 60)
    return (
        f"step {done:>{len(str(steps))}}/{steps}  epoch {logged['epoch']:6.2f}  loss {logged['loss']:.4f}  "
        f"lr {logged['lr']:.2e}  grad {logged['grad_norm']:.2f}  {logged['images_per_second']:.0f} images/s  "
        f"waiting for data {logged['data_wait']:.0%}  ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}"
    )


def _evaluation_line(done: int, metrics: dict[str, float]) -> str:
    raw = f" (without EMA {metrics['top1_model']:.2f})" if "top1_model" in metrics else ""
    return (
        f"step {done}  validation: top-1 {metrics['top1']:.2f} %{raw}  top-5 {metrics['top5']:.2f} %  "
        f"loss {metrics['val_loss']:.4f}  {metrics['val_samples']:.0f} images"
    )
