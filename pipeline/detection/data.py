"""Images with their objects: training views by micro-batch, in the order of `pipeline/data/order.py`, or whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.config.detect import DetectConfig
from pipeline.data.augment import normalise
from pipeline.data.keyed import view_keys
from pipeline.data.loader import worker_batches
from pipeline.data.mixture import TrainingOrder
from pipeline.data.order import MicroBatch
from pipeline.data.shards import DataError
from pipeline.data.views import BadSample
from pipeline.dense.data import Annotated, DenseReader, each_once
from pipeline.detection.augment import training_view
from pipeline.detection.scenes import Objects, Scenes
from pipeline.ranks.collectives import Ranks


class SceneBatch(NamedTuple):
    """A micro-batch of one rank, B images with M objects in all: few tensors, since each is a file to a worker process.

    images: uint8 (B, 3, S, S); boxes, labels, masks: as `Objects` has them, (M, ...), image after image; counts: of
    each image; samples, views: int64 (B,), as of `pipeline.data.views.Batch`; bad: none, damage ends the run.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None
    counts: tuple[int, ...]
    samples: Tensor
    views: Tensor
    bad: tuple[BadSample, ...] = ()

    def on(self, device: torch.device) -> Scenes:
        """What a detector takes."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        boxes, labels = (moved(each).split(list(self.counts)) for each in (self.boxes, self.labels))
        masks = [None] * len(boxes) if self.masks is None else moved(self.masks).split(list(self.counts))
        return Scenes(normalise(moved(self.images)), tuple(map(Objects, boxes, labels, masks)))


def objects_of(annotations: Sequence[dict[str, Any]], height: int, width: int, masks: bool) -> Objects:
    """The objects of an image that are to be learned, as `KEY.json` tells of them: crowds are left out.

    With `masks`, so are objects of which the source has no mask: taught without one, they would be taught as empty.
    """
    taken = [each for each in annotations if not each["iscrowd"] and (each["segmentation"] or not masks)]
    told = torch.tensor([each["bbox"] for each in taken], dtype=torch.float32).view(-1, 4)
    boxes = torch.cat([told[:, :2], told[:, :2] + told[:, 2:]], 1)
    labels = torch.tensor([each["label"] for each in taken], dtype=torch.int64)
    if not masks:
        return Objects(boxes, labels, None)
    if not taken:
        return Objects(boxes, labels, torch.zeros(0, height, width, dtype=torch.uint8))
    decoded = coco_mask.decode([each["segmentation"] for each in taken])  # (H, W, N)
    return Objects(boxes, labels, torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1))))


class _Views(Dataset[Any]):
    """Whole micro-batches of training views, one at a time in each worker process."""

    def __init__(self, config: DetectConfig, reader: DenseReader) -> None:
        self.config, self.reader = config, reader

    def __getitems__(self, micro: MicroBatch) -> SceneBatch | DataError:
        augment, side = self.config.augment, self.config.data.resolution
        images, found = [], []
        for sample, key in zip(micro.samples.tolist(), view_keys(self.config.seed, micro.views).tolist(), strict=True):
            try:
                drawn = self.reader.annotated(sample)
            except DataError as error:
                return error
            height, width = drawn.image.shape[1:]
            objects = objects_of(drawn.annotations, height, width, self.config.model.masks)
            image, objects = training_view(drawn.image, objects, augment, side, key)
            images.append(image)
            found.append(objects)
        masks = [each.masks for each in found if each.masks is not None]
        return SceneBatch(
            torch.stack(images),
            torch.cat([each.boxes for each in found]),
            torch.cat([each.labels for each in found]),
            torch.cat(masks) if masks else None,
            tuple(len(each.labels) for each in found),
            torch.from_numpy(micro.samples),
            torch.from_numpy(micro.views),
        )


def training_views(
    config: DetectConfig, reader: DenseReader, order: TrainingOrder, ranks: Ranks, first_step: int, last_step: int
) -> Iterator[SceneBatch]:
    """Micro-batches of one rank for the run's steps first_step .. last_step - 1, across epochs. Raises DataError."""
    micro = config.train.micro_batch
    micros = order.micro_batches(first_step, last_step, ranks.rank, ranks.count, micro)
    return worker_batches(_Views(config, reader), config.data.workers_per_rank, batch_sampler=micros)


def validation_images(config: DetectConfig, reader: DenseReader, ranks: Ranks) -> Iterator[Annotated]:
    """Every validation image with all of its annotations: see `each_once`."""
    return each_once(reader, reader.annotated, config.data.workers_per_rank, ranks)
