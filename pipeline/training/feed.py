"""From the loader's batches to what a step or an evaluation takes: on the device, augmented, mixed, drawn by key."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from data_prep.manifest import Manifest
from pipeline.config.load import Config
from pipeline.config.run import RunConfig
from pipeline.data.device_augment import DeviceAugment
from pipeline.data.keyed import view_keys
from pipeline.data.loader import training_batches, validation_batches
from pipeline.data.mixture import TrainingOrder
from pipeline.data.opened import open_manifest
from pipeline.data.order import SampleOrder
from pipeline.data.stream.manifest import load_manifest, streamed_set
from pipeline.data.stream.reader import read_again
from pipeline.data.stream.route import ShardLengths
from pipeline.data.views import BadSampleLedger, Batch
from pipeline.ranks.collectives import Ranks, from_rank_0, max_over_ranks
from pipeline.ranks.log_file import say
from pipeline.ranks.watchdog import Watchdog
from pipeline.records.meter import Meter
from pipeline.training.recipe import Mixing, seed_micro_batch
from pipeline.training.task import Batch as AnyBatch
from pipeline.training.task import EvaluationStopped, Judging, Place

_ASK_EVERY_BATCHES = 16  # of an evaluation, whether some rank was asked to stop: seconds on a GPU
_Item = TypeVar("_Item")


def placing(config: Config, device: torch.device) -> Place:
    """What brings a batch's images and labels to the device, and augments them there where the config says so."""
    augment = DeviceAugment(config.augment, device) if config.augment.where == "device" else None

    def place(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        return augment(images, view_keys(config.seed, batch.views.numpy())) if augment else images, labels

    return place


class Feed:
    """The micro-batches of one rank, step by step: (inputs, targets) on the device.

    All random state is keyed by (seed, step, place in the global batch): a step is the same step on any number of ranks
    and after any restart.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        batches: Iterator[AnyBatch],
        place: Place,
        mix: Mixing,
        bad_samples: BadSampleLedger,
        meter: Meter,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.batches, self.place, self.mix = config, batches, place, mix
        self.bad_samples, self.meter, self.watchdog = bad_samples, meter, watchdog
        self.accumulation = config.train.accumulation_steps(ranks.count)
        self.first_slot = ranks.rank * self.accumulation

    def step(self, step: int) -> Iterator[tuple[Any, Any]]:
        """What the optimizer step `step` of the run is made of. Steps have to be taken in order."""
        for micro in range(self.accumulation):
            self.watchdog.tick(f"waiting for data, step {step + 1}")
            with self.meter.waiting():
                batch = next(self.batches)
            self.watchdog.tick(f"training, step {step + 1}")
            self.bad_samples.add(step, batch.bad)
            key = (self.config.seed, step, (self.first_slot + micro) * self.config.train.micro_batch)
            seed_micro_batch(key)
            yield self.mix(*self.place(batch), key)


def run_manifest(config: Config, ranks: Ranks) -> Manifest:
    """The manifest of the run's data. A collective for streams: rank 0 may have to read shards to know them."""
    if config.data.reader == "indexed":
        return open_manifest(config.data)
    return from_rank_0(load_manifest(config.data) if ranks.rank == 0 else None)


def run_batches(
    config: Config, manifest: Manifest, order: TrainingOrder, ranks: Ranks, first_step: int, steps: int
) -> Iterator[Batch]:
    """This rank's batches from `first_step` on. Of a stream, rank 0 tells what going on there costs."""
    if config.data.reader == "indexed":
        return training_batches(config, manifest, order, ranks, first_step, steps)
    lengths = ShardLengths.of_run(config.run_dir, writes=True)
    if first_step and ranks.rank == 0:
        assert isinstance(order, SampleOrder)
        again = read_again(config, streamed_set(config.data, manifest), order, lengths, first_step)
        told = f"stream: {again:,} samples are read once more, by all lanes, to go on at step {first_step + 1:,}"
        say(told, sys.stdout)
    return training_batches(config, manifest, order, ranks, first_step, steps, lengths)


def evaluation_batches(config: Config, manifest: Manifest, judging: Judging) -> Iterator[Batch]:
    """This rank's validation batches. A collective. Raises EvaluationStopped on all ranks if one was asked to stop."""
    most = -(-manifest.split("val").samples // judging.ranks.count)  # of one rank
    batches = validation_batches(config, manifest, judging.ranks)
    return until_stopped(batches, -(-most // config.evaluate.micro_batch), judging)


def until_stopped(batches: Iterator[_Item], most: int, judging: Judging) -> Iterator[_Item]:
    """`batches`, of which no rank has more than `most`. A collective: each rank is asked as often as any other.

    Raises EvaluationStopped on all ranks if one was asked to stop.
    """
    for number in range(most):
        judging.watchdog.tick(f"evaluating, batch {number + 1}")
        if number % _ASK_EVERY_BATCHES == 0:
            asked = torch.tensor(float(judging.stop.requested), device=judging.device)
            if max_over_ranks(asked).item():
                raise EvaluationStopped
        batch = next(batches, None)
        if batch is not None:
            yield batch
