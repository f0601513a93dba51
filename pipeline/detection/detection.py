"""The task of detection: see `pipeline/training/task.py`."""

from __future__ import annotations

import csv
import io
from collections.abc import Generator, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data_prep.storage import atomic_write
from pipeline.config.detect import DetectConfig
from pipeline.data.mixture import TrainingOrder
from pipeline.dense.data import DenseReader
from pipeline.dense.opened import dense_order
from pipeline.dense.segmentation import CLASSES_FILE
from pipeline.dense.start import start_backbone
from pipeline.detection.base import Detector
from pipeline.detection.data import SceneBatch, training_views, validation_images
from pipeline.detection.detector import build_detector
from pipeline.detection.evaluate import evaluated, summarised
from pipeline.detection.opened import open_instances
from pipeline.detection.scenes import Scenes
from pipeline.models.hornet import HorNet
from pipeline.ranks.collectives import Ranks, from_rank_0, gather
from pipeline.records.console import validation_row
from pipeline.records.flops import PASSES
from pipeline.training.feed import until_stopped
from pipeline.training.recipe import Loss, Mixing
from pipeline.training.task import Judging, Kind, Place, Start


class Detection:
    """See `Task`. Inputs are `Scenes`; targets none, since a detector makes losses itself; the loss is their sum."""

    score = "box_ap"

    def __init__(self, config: DetectConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.data = open_instances(config)
        self.class_names = self.data.classes
        self.order: TrainingOrder = dense_order(config, self.data)
        self.reader = DenseReader(config.data.path, self.data, "train")
        self.mix: Mixing = lambda scenes, targets, key: (scenes, targets)
        self.loss: Loss = lambda losses, targets: torch.stack(list(losses.values())).sum()

    @staticmethod
    def prepare(config: DetectConfig) -> None:
        """Nothing: the shards have their indexes."""

    def net(self) -> Detector:
        return build_detector(self.config.model, self.data.num_classes, self.config.data.resolution)

    def backbone(self, net: nn.Module) -> HorNet:
        return cast(Detector, net).backbone

    def start(self, net: nn.Module, command: str) -> Start:
        return start_backbone(self.backbone(net), self.config)

    def place(self, device: torch.device) -> Place:
        def place(batch: SceneBatch) -> tuple[Scenes, None]:
            return batch.on(device), None

        return place

    def batches(self, first_step: int, last_step: int) -> Iterator[SceneBatch]:
        return training_views(self.config, self.reader, self.order, self.ranks, first_step, last_step)

    def again(self, step: int) -> Generator[SceneBatch, None, None]:
        here = self.config.model_copy(update={"data": self.config.data.model_copy(update={"workers_per_rank": 0})})
        batches = training_views(here, self.reader, self.order, self.ranks, step, step + 1)
        return cast(Generator[SceneBatch, None, None], batches)

    def resolution_at(self, epoch: int) -> int:
        return self.config.data.resolution

    def flops_per_image(self, resolution: int) -> float:
        with torch.device("meta"):
            net, image = self.net(), torch.empty(1, 3, resolution, resolution)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.dry_run(image)
        return PASSES * float(counter.get_total_flops())

    def measure(self, net: nn.Module, judging: Judging) -> dict[str, float]:
        config, ranks = self.config, judging.ranks
        reader = DenseReader(config.data.path, self.data, "val")
        images = until_stopped(validation_images(config, reader, ranks), -(-len(reader) // ranks.count), judging)
        evaluator, _ = evaluated(
            *(net, images, self.class_names, config.evaluate, config.model.detections),
            *(judging.device, judging.bf16),
        )
        # Once all have all of their images, however many: the rest is rank 0's, for which the others wait.
        parts = gather(evaluator.parts())
        judging.watchdog.tick("computing average precision")
        metrics = None
        if ranks.rank == 0:
            for part in parts[1:]:
                evaluator.merge(part)
            metrics = summarised(evaluator, len(reader))
            self._write_classes(evaluator.per_class())
        return from_rank_0(metrics)

    def _write_classes(self, rows: list[dict[str, Any]]) -> None:
        """The newest evaluation, class by class, worst first."""
        text = io.StringIO()
        table = csv.DictWriter(text, ["class", "annotations", "box_ap", "mask_ap"])
        table.writeheader()
        for row in sorted(rows, key=lambda row: (row["box_ap"] is None, row["box_ap"] or 0.0)):
            table.writerow({key: f"{value:.2f}" if isinstance(value, float) else value for key, value in row.items()})
        with atomic_write(self.config.run_dir / CLASSES_FILE) as file:
            file.write(text.getvalue().encode())

    def described(self, parameters: int) -> dict[str, str]:
        model, data = self.config.model, self.config.data
        split, every = self.data.split("train"), self.config.evaluate.every_epochs
        validation = 0 if every is None else self.data.split("val").samples
        head = f"{model.head}{f' on {model.pyramid}' if 'rcnn' in model.head else ''} of {model.channels} channels"
        objects = f"{sum(split.class_annotations):,} objects{' with masks' if model.masks else ''}"
        classes = f"{self.data.num_classes:,} classes"
        return {
            "model": f"{model.name}, {head}, {parameters / 1e6:.2f} M parameters, crops of {data.resolution} px",
            "data": f"{self.data.name}: {split.samples:,} training images, {objects}, {classes}",
            "validation": validation_row(validation, every),
        }

    def evaluation_line(self, done: int, metrics: Mapping[str, float]) -> str:
        raw = f" (without EMA {metrics['box_ap_model']:.2f})" if "box_ap_model" in metrics else ""
        masks = f"  mask AP {metrics['mask_ap']:.2f} %" if "mask_ap" in metrics else ""
        return (
            f"step {done}  validation: box AP {metrics['box_ap']:.2f} %{raw}  AP50 {metrics['box_ap50']:.2f} %  "
            f"AP75 {metrics['box_ap75']:.2f} %{masks}  {metrics['val_samples']:.0f} images"
        )


DETECTION = Kind(Detection.prepare, Detection)
