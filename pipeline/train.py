"""The run, top to bottom: pretraining and fine-tuning are the same code with another configuration."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import torch

from data_prep.foreign import ensure_indexed
from data_prep.manifest import MANIFEST_NAME, Manifest, atomic_write
from pipeline import checkpoint, engine, transfer
from pipeline.config import Config
from pipeline.data.device_augment import DeviceAugment
from pipeline.data.keyed import view_keys
from pipeline.data.loader import Ranks, training_batches, training_order, validation_batches
from pipeline.data.views import BadSampleLedger, Batch, check_bad_samples
from pipeline.evaluate import evaluate
from pipeline.lifetime import exclusive, leave_with_launcher, raise_on_sigterm
from pipeline.recipe import Mixing, build_model, mixing_and_loss, optimizer, parameter_groups, schedule
from pipeline.report import Meter, evaluation_line, print_plan, print_summary, step_line
from pipeline.tracking import Tracker

CONFIG_FILE, LOG_FILE, SUMMARY_FILE, BAD_SAMPLES = "config.yaml", "log.jsonl", "summary.json", "bad_samples"


def main(command: str, config: Config, resume: bool) -> None:
    """Run `command` (pretrain or finetune) on the ranks that the launcher started, from the newest checkpoint if any.

    Raises ConfigError, ManifestError, DataError, CheckpointError or RunBusyError for what a user can mend.
    """
    leave_with_launcher()
    raise_on_sigterm()
    ranks, device = engine.start_ranks()
    with ExitStack() as stack:
        if ranks.rank == 0:
            stack.enter_context(exclusive(config.run_dir))
            ensure_indexed(config.data.path)
        engine.barrier()
        train(command, config, ranks, device, resume, stack)
    # Not after an error: the other ranks are then still inside a collective, and leaving it in order would hang.
    engine.stop_ranks()


def train(command: str, config: Config, ranks: Ranks, device: torch.device, resume: bool, stack: ExitStack) -> None:
    """Train, evaluate, checkpoint and log one run; on `stack` goes what has to be told when it fails."""
    manifest = Manifest.load(config.data.path)
    order = training_order(config, manifest)
    steps = order.steps_per_epoch * config.train.epochs
    accumulation = config.train.accumulation_steps(ranks.count)

    # Weights: the run's own newest checkpoint, else the configured start, else random.
    torch.manual_seed(config.seed)
    model = build_model(config.model, manifest.num_classes, config.data.resolution)
    twin = build_model(config.model, manifest.num_classes, config.data.resolution)  # holds full weights to evaluate
    # Rank 0 chooses: on a network file system, hosts may for a while see different listings.
    found = checkpoint.newest_of_run(config, manifest.dataset_id, resume) if ranks.rank == 0 else (None, None)
    last, meta = engine.from_rank_0(found)
    origin = "random weights"
    if last is not None:
        model.load_state_dict(checkpoint.read_tensors(last / "model.safetensors"))
        origin = f"resumed from {last}"
    elif config.init.checkpoint is not None:
        source = transfer.find_source(config.init)
        transfer.check_model(source, config.model.name)
        origin = transfer.load_into(model, source, manifest.synsets)
    first_step = meta.step if meta else 0
    seconds_before = meta.seconds if meta else 0.0

    adamw = optimizer(parameter_groups(model, config.optimizer), config)
    deepspeed_engine = engine.Engine(config, model, adamw, ranks, device)
    if last is not None:
        deepspeed_engine.load_state(checkpoint.read_optimizer(last), first_step, meta.skipped_steps)
    rates = schedule(deepspeed_engine.optimizer, config.optimizer, order.steps_per_epoch, steps)
    mix, loss = mixing_and_loss(config.augment, manifest.num_classes)

    tracker = None
    if ranks.rank == 0:
        with atomic_write(config.run_dir / CONFIG_FILE) as file:
            file.write(config.to_yaml().encode())
        manifest.save(config.run_dir)
        tags = {"stage": command, "dataset": manifest.name, "dataset_id": manifest.dataset_id, "origin": origin}
        tracker = stack.enter_context(Tracker(config, tags, first_step))
        precision = "bf16 autocast" if deepspeed_engine.bf16 else "fp32"
        where = f"{device.type}, {precision}"
        print_plan(command, config, manifest, steps, ranks.count, deepspeed_engine.parameters, where, origin)
    bad_samples = BadSampleLedger(
        config.run_dir / BAD_SAMPLES, ranks.rank, first_step, first_step // order.steps_per_epoch
    )
    engine.barrier()

    batches = training_batches(config, manifest, order, ranks, first_step, steps)
    place = _placing(config, device)
    started = time.monotonic()
    metrics: dict[str, float] = dict(meta.metrics) if meta else {}
    meter = Meter(config.train.global_batch, ranks.count, engine.sum_over_ranks)

    for step in range(first_step, steps):
        rates.step_update(step)
        bad_samples.begin(step // order.steps_per_epoch)
        prepared = _micro_batches(batches, place, bad_samples, meter, mix, config, ranks, step, accumulation)
        result = deepspeed_engine.train_step(prepared, loss)
        meter.add(result.loss)
        done = step + 1
        seconds = seconds_before + time.monotonic() - started

        epoch_ends = done % order.steps_per_epoch == 0
        if done % config.tracking.log_every_steps == 0 or epoch_ends or done == steps:
            logged = meter.read(done, bad_samples.count)
            logged["epoch"] = done / order.steps_per_epoch
            logged["lr"] = max(group["lr"] for group in deepspeed_engine.optimizer.param_groups)
            logged["grad_norm"] = float(result.grad_norm)
            logged["skipped_steps"] = deepspeed_engine.skipped_steps
            if tracker:
                tracker.log(done, logged, step_line(done, steps, logged, seconds / done))
            check_bad_samples(int(logged["bad_samples"]), config.data, config.run_dir / BAD_SAMPLES)
            if not math.isfinite(logged["loss"]):
                raise FloatingPointError(
                    f"the loss is {logged['loss']} at step {done}. The same command would meet it again: start another "
                    f"run from the last good weights, for example with a lower rate: name=second "
                    f"init.checkpoint={last or config.run_dir} init.weights=model optimizer.lr_peak=..."
                )

        if done == steps or (epoch_ends and done // order.steps_per_epoch % config.evaluate.every_epochs == 0):
            with meter.paused():
                metrics = _evaluate(deepspeed_engine, twin, config, manifest, ranks, device)
            if tracker:
                tracker.log(done, metrics, evaluation_line(done, metrics))

        if done % config.checkpoint.every_steps == 0 or done == steps:
            with meter.paused():
                state = checkpoint.Meta(
                    step=done,
                    samples_seen=done * config.train.global_batch,
                    skipped_steps=deepspeed_engine.skipped_steps,
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
        files = (CONFIG_FILE, LOG_FILE, SUMMARY_FILE, MANIFEST_NAME)
        tracker.finish("FINISHED", [config.run_dir / name for name in files])
        print_summary(config, summary)


def _placing(config: Config, device: torch.device) -> Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]:
    """What brings a batch's images and labels to the device, and augments them there where the config says so."""
    augment = DeviceAugment(config.augment, device) if config.augment.where == "device" else None

    def place(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        return augment(images, view_keys(config.seed, batch.views.numpy())) if augment else images, labels

    return place


def _micro_batches(
    batches: Iterator[Batch],
    place: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]],
    bad_samples: BadSampleLedger,
    meter: Meter,
    mix: Mixing,
    config: Config,
    ranks: Ranks,
    step: int,
    accumulation: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(images, targets) on the device for one optimizer step of this rank, with all random state keyed by position."""
    for micro in range(accumulation):
        with meter.waiting():
            batch = next(batches)
        bad_samples.add(step, batch.bad)
        slot = (ranks.rank * accumulation + micro) * config.train.micro_batch
        key = (config.seed, step, slot)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))  # drop path and dropout
        yield mix(*place(batch), key)


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
