"""What a net finds in whole images, every image of a split once, and how good that is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from pipeline.config.detect import DetectionEvaluate
from pipeline.data.augment import normalise
from pipeline.data.shards import DataError
from pipeline.dense.augment import fitted_size
from pipeline.dense.data import Annotated
from pipeline.detection.average_precision import Evaluator
from pipeline.detection.scenes import Found

Look = Callable[[Annotated, Found], None]
_OVERLAP_MAX = 0.5  # of two boxes of one class, where those of the mirrored image join in: as in R-CNNs


@torch.inference_mode()
def found_in(net: nn.Module, image: Tensor, settings: DetectionEvaluate, detections: int, bf16: bool) -> Found:
    """What is found in an image uint8 (3, H, W) on the net's device, in eval mode: boxes in its own pixels.

    With settings.flip also in the mirrored image, and of both the `detections` best that do not say the same.
    """
    height, width = image.shape[1:]
    high, wide = fitted_size(height, width, settings.short_side_px, settings.long_side_max_px, 1.0)
    resized = F.interpolate(normalise(image[None]), (high, wide), mode="bilinear", align_corners=False, antialias=True)
    with torch.autocast(image.device.type, torch.bfloat16, enabled=bf16):
        (found,) = net(resized)
        if settings.flip:
            (mirrored,) = net(resized.flip(3))
            found = _joined(found, _mirrored(mirrored, wide), detections)
    scale = found.boxes.new_tensor([width / wide, height / high] * 2)
    bounds = found.boxes.new_tensor([width, height] * 2)
    return found._replace(boxes=(found.boxes * scale).clamp(min=0).minimum(bounds))


def _mirrored(found: Found, width: int) -> Found:
    boxes = found.boxes[:, [2, 1, 0, 3]] * found.boxes.new_tensor([-1, 1, -1, 1])
    boxes = boxes + found.boxes.new_tensor([width, 0, width, 0])
    return found._replace(boxes=boxes, masks=None if found.masks is None else found.masks.flip(2))


def _joined(one: Found, other: Found, detections: int) -> Found:
    boxes, scores, labels = (torch.cat(pair) for pair in zip(one[:3], other[:3], strict=True))
    kept = batched_nms(boxes, scores, labels, _OVERLAP_MAX)[:detections]
    masks = None
    if one.masks is not None and other.masks is not None:
        masks = torch.cat([one.masks, other.masks])[kept]
    return Found(boxes[kept], scores[kept], labels[kept], masks)


def evaluated(
    net: nn.Module,
    images: Iterable[Annotated],
    class_names: list[str],
    settings: DetectionEvaluate,
    detections: int,
    device: torch.device,
    bf16: bool,
    look: Look | None = None,
) -> tuple[Evaluator, int]:
    """The evaluator of this rank's images, and their number. `look` gets each image and what was found in it."""
    net.eval()
    evaluator, count = Evaluator(class_names), 0
    for each in images:
        found = found_in(net, each.image.to(device), settings, detections, bf16)
        height, width = each.image.shape[1:]
        evaluator.add(each.image_id, (height, width), each.annotations, found)
        count += 1
        if look is not None:
            look(each, found)
    return evaluator, count


def summarised(evaluator: Evaluator, images: int) -> dict[str, float]:
    """`Evaluator.results` of a whole split, and val_samples. Raises DataError where it has no objects."""
    results = evaluator.results()
    if "box_ap" not in results:
        raise DataError("there are no objects to evaluate on, crowds aside: no score is better than a made-up one")
    return {**results, "val_samples": float(images)}
