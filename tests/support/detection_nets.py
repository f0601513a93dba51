"""Small detectors, scenes made of two squares each, and how well the one finds the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor

from pipeline.config.detect import DetectionModel
from pipeline.detection.average_precision import Evaluator
from pipeline.detection.base import Detector
from pipeline.detection.detector import build_detector
from pipeline.detection.scenes import Objects, Scenes

PX, CLASSES = 64, ["red", "blue"]
COLOURS = torch.tensor([[2.0, -1.0, -1.0], [-1.0, -1.0, 2.0]])


def detector(head: str, seed: int = 0, **more: Any) -> Detector:
    """In training mode, with random weights."""
    torch.manual_seed(seed)
    wanted = {"name": "hornet_nano_gf", "drop_path_rate": 0.0, "layer_scale_init": 0.01, "checkpointing": "selective"}
    wanted |= {"head": head, "pyramid": "fpn", "channels": 32, "head_channels": 64, "masks": head.endswith("rcnn")}
    wanted |= {"queries": 12, "anchor_px": 8, "sampled": 512, "detections": 20, **more}
    return build_detector(DetectionModel.model_validate(wanted), len(CLASSES), PX).train()


def squares(count: int = 2, seed: int = 0) -> Scenes:
    """Noise with a red and a blue rectangle, the blue one in front."""
    draw = torch.Generator().manual_seed(seed)
    images, objects = 0.3 * torch.randn(count, 3, PX, PX, generator=draw), []
    for image in images:
        boxes, masks = [], []
        for colour in COLOURS:
            width, height = (int(torch.randint(14, 28, (), generator=draw)) for _ in range(2))
            left, top = (int(torch.randint(0, PX - side, (), generator=draw)) for side in (width, height))
            mask = torch.zeros(PX, PX, dtype=torch.uint8)
            mask[top : top + height, left : left + width] = 1
            image[:, mask.bool()] = colour[:, None]
            masks = [each * (1 - mask) for each in masks] + [mask]
            boxes.append([left, top, left + width, top + height])
        objects.append(Objects(torch.tensor(boxes).float(), torch.arange(len(boxes)), torch.stack(masks)))
    return Scenes(images, tuple(objects))


def nothing(count: int = 2) -> Scenes:
    """Images without an object."""
    none = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, PX, PX, dtype=torch.uint8))
    return Scenes(squares(count).images, (none,) * count)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def learn(net: Detector, scenes: Scenes, steps: int, lr: float = 3e-3) -> None:
    """The same scenes over and over, each step seeded."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10) * (1 - step / steps)
        torch.manual_seed(step)
        optimizer.zero_grad()
        total(net(scenes)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def precision(net: Detector, scenes: Scenes) -> dict[str, float]:
    """See `Evaluator.results`."""
    evaluator = Evaluator(CLASSES)
    for number, (objects, found) in enumerate(zip(scenes.objects, net.eval()(scenes.images), strict=True)):
        truth = []
        for box, label, mask in zip(objects.boxes.tolist(), objects.labels.tolist(), objects.masks, strict=True):
            runs = coco_mask.encode(np.asfortranarray(mask.numpy()))
            left, top, right, bottom = box
            known = {"id": 1, "label": label, "bbox": [left, top, right - left, bottom - top], "iscrowd": 0}
            truth.append({**known, "area": float(mask.sum()), "segmentation": runs})
        evaluator.add(number, (PX, PX), truth, found)
    return evaluator.results()
