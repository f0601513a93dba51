"""The task of classification, as published: accuracy over the validation split, and all that leads there."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import cast

import torch
from torch import nn

from data_prep.foreign.index import ensure_indexed
from pipeline.checkpoints.choice import check_model, find_source
from pipeline.checkpoints.files import CheckpointError
from pipeline.checkpoints.transfer import load_into
from pipeline.config.load import Config
from pipeline.data.loader import training_batches
from pipeline.data.opened import training_order
from pipeline.data.order import validation_samples
from pipeline.data.stream.route import ShardLengths
from pipeline.data.views import Batch
from pipeline.evaluation.accuracy import evaluate
from pipeline.models.build import build_model
from pipeline.models.hornet import HorNet
from pipeline.ranks.collectives import Ranks, sum_over_ranks
from pipeline.records.console import classification_rows, evaluation_line
from pipeline.records.flops import training_flops_per_image
from pipeline.training.feed import evaluation_batches, placing, run_batches, run_manifest
from pipeline.training.initial import found_in_mlflow, local_init
from pipeline.training.recipe import mixing_and_loss
from pipeline.training.task import Judging, Kind, Place, Start


class Classification:
    """See `Task`."""

    score = "top1"

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.data = run_manifest(config, ranks)
        self.class_names = self.data.synsets
        self.order = training_order(config, self.data)
        validation_samples(config, self.data)
        self.mix, self.loss = mixing_and_loss(config.augment, self.data.num_classes)

    @staticmethod
    def prepare(config: Config) -> None:
        """Index the tars of others: once, and for hours where there are many."""
        if config.data.reader == "indexed":
            for each in config.data.sets:
                ensure_indexed(each.path)

    def net(self) -> HorNet:
        return build_model(self.config.model, self.data.num_classes, self.config.data.resolution)

    def backbone(self, net: nn.Module) -> HorNet:
        return cast(HorNet, net)

    def start(self, net: nn.Module, command: str) -> Start:
        source = find_source(local_init(self.config))
        check_model(source, self.config.model.name)
        fitted = load_into(net, source, self.class_names)
        if command == "adapt" and fitted.unmatched:
            raise CheckpointError(
                f"adapt keeps the classes, and {len(fitted.unmatched)} of {self.data.num_classes} are not in "
                f"{source.weights} ({', '.join(fitted.unmatched[:3])}): `finetune` trains rows of their own for them"
            )
        name = found_in_mlflow(self.config)
        return Start(f"{name}: {fitted.report}" if name else fitted.report, fitted.unmatched)

    def place(self, device: torch.device) -> Place:
        return placing(self.config, device)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        return run_batches(self.config, self.data, self.order, self.ranks, first_step, last_step)

    def again(self, step: int) -> Generator[Batch, None, None]:
        # In this process: starting workers for one batch takes longer than decoding it (FFCV's reader needs its one).
        here = self.config.model_copy(update={"data": self.config.data.model_copy(update={"workers_per_rank": 0})})
        lengths = ShardLengths.of_run(here.run_dir) if here.data.reader == "stream" else None
        batches = training_batches(here, self.data, self.order, self.ranks, step, step + 1, lengths)
        return cast(Generator[Batch, None, None], batches)

    def resolution_at(self, epoch: int) -> int:
        return self.config.data.resolution_at(epoch)

    def flops_per_image(self, resolution: int) -> float:
        return training_flops_per_image(self.config.model, self.data.num_classes, resolution)

    def measure(self, net: nn.Module, judging: Judging) -> dict[str, float]:
        batches = evaluation_batches(self.config, self.data, judging)
        return evaluate(net, batches, judging.device, judging.bf16, sum_over_ranks)

    def described(self, parameters: int) -> dict[str, str]:
        return classification_rows(self.config, self.data, parameters)

    def evaluation_line(self, done: int, metrics: Mapping[str, float]) -> str:
        return evaluation_line(done, metrics)


CLASSIFICATION = Kind(Classification.prepare, Classification)
