"""The task of semantic segmentation: see `pipeline/training/task.py`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Generator, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data_prep.storage import atomic_write
from pipeline.config.dense import SegmentConfig
from pipeline.data.augment import normalise
from pipeline.data.mixture import TrainingOrder
from pipeline.data.views import Batch
from pipeline.dense.data import DenseReader, training_crops, validation_images
from pipeline.dense.evaluate import class_ious, confusion, summarised
from pipeline.dense.opened import dense_order, open_dense
from pipeline.dense.segmentor import Segmentor, segmentation_loss
from pipeline.dense.start import start_backbone
from pipeline.models.hornet import HorNet
from pipeline.ranks.collectives import Ranks, sum_over_ranks
from pipeline.records.console import validation_row
from pipeline.records.flops import PASSES
from pipeline.training.feed import until_stopped
from pipeline.training.recipe import Loss, Mixing
from pipeline.training.task import Judging, Kind, Place, Start

CLASSES_FILE = "classes.csv"


class Segmentation:
    """See `Task`."""

    score = "miou"

    def __init__(self, config: SegmentConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.data = open_dense(config)
        self.class_names = self.data.classes
        self.order: TrainingOrder = dense_order(config, self.data)
        self.reader = DenseReader(config.data.path, self.data, "train")
        self.mix: Mixing = lambda images, masks, key: (images, masks)
        self.loss: Loss = segmentation_loss(config.model, self.data.num_classes)

    @staticmethod
    def prepare(config: SegmentConfig) -> None:
        """Nothing: the shards have their indexes."""

    def net(self) -> Segmentor:
        return Segmentor(self.config.model, self.data.num_classes, self.config.data.resolution)

    def backbone(self, net: nn.Module) -> HorNet:
        return cast(Segmentor, net).backbone

    def start(self, net: nn.Module, command: str) -> Start:
        return start_backbone(self.backbone(net), self.config)

    def place(self, device: torch.device) -> Place:
        def place(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            images = batch.images.to(device, non_blocking=True)
            return normalise(images), batch.labels.to(device, non_blocking=True).long()

        return place

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        return training_crops(self.config, self.reader, self.order, self.ranks, first_step, last_step)

    def again(self, step: int) -> Generator[Batch, None, None]:
        here = self.config.model_copy(update={"data": self.config.data.model_copy(update={"workers_per_rank": 0})})
        batches = training_crops(here, self.reader, self.order, self.ranks, step, step + 1)
        return cast(Generator[Batch, None, None], batches)

    def resolution_at(self, epoch: int) -> int:
        return self.config.data.resolution

    def flops_per_image(self, resolution: int) -> float:
        with torch.device("meta"):
            net, image = self.net().eval(), torch.empty(1, 3, resolution, resolution)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(image)
        return PASSES * float(counter.get_total_flops())

    def measure(self, net: nn.Module, judging: Judging) -> dict[str, float]:
        reader, config = DenseReader(self.config.data.path, self.data, "val"), self.config
        most = -(-len(reader) // judging.ranks.count)
        images = until_stopped(validation_images(config, reader, judging.ranks), most, judging)
        pixels, loss, count = confusion(
            *(net, images, config.evaluate, config.data.resolution, self.data.num_classes),
            *(judging.device, judging.bf16, sum_over_ranks),
        )
        if judging.ranks.rank == 0:
            self._write_classes(pixels)
        return summarised(pixels, loss, count)

    def _write_classes(self, pixels: torch.Tensor) -> None:
        """The newest evaluation, class by class, worst first."""
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(["class", "iou", "pixels", "pixels_found", "mistaken_for"])
        ious = class_ious(pixels)
        for label in sorted(range(len(ious)), key=lambda label: (math.isnan(ious[label]), float(ious[label]))):
            wrong = pixels[label].clone()
            wrong[label] = 0
            other = self.class_names[int(wrong.argmax())] if int(wrong.max()) else ""
            row: list[Any] = [self.class_names[label], "" if math.isnan(ious[label]) else f"{float(ious[label]):.2f}"]
            table.writerow([*row, int(pixels[label].sum()), int(pixels[:, label].sum()), other])
        with atomic_write(self.config.run_dir / CLASSES_FILE) as file:
            file.write(text.getvalue().encode())

    def described(self, parameters: int) -> dict[str, str]:
        model, data = self.config.model, self.config.data
        images, classes = self.data.split("train").samples, self.data.num_classes
        every = self.config.evaluate.every_epochs
        validation = 0 if every is None else self.data.split("val").samples
        head = f"{model.head} head of {model.head_channels} channels"
        return {
            "model": f"{model.name}, {head}, {parameters / 1e6:.2f} M parameters, crops of {data.resolution} px",
            "data": f"{self.data.name}: {images:,} training images with masks, {classes:,} classes",
            "validation": validation_row(validation, every),
        }

    def evaluation_line(self, done: int, metrics: Mapping[str, float]) -> str:
        raw = f" (without EMA {metrics['miou_model']:.2f})" if "miou_model" in metrics else ""
        return (
            f"step {done}  validation: mIoU {metrics['miou']:.2f} %{raw}  class accuracy {metrics['macc']:.2f} %  "
            f"pixels {metrics['pixel_accuracy']:.2f} %  loss {metrics['val_loss']:.4f}  "
            f"{metrics['val_samples']:.0f} images"
        )


SEGMENTATION = Kind(Segmentation.prepare, Segmentation)
