"""COCO's average precision of boxes and masks, by faster-coco-eval: over a whole split, added up image by image.

torchmetrics 1.9.0 has the same by the same library, but its recall levels are float32 and some of its figures differ in
the third digit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from pipeline.detection.scenes import Found

MASK_THRESHOLD = 0.5
RESULTS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_KINDS = {"box": "bbox", "mask": "segm"}  # ours: the library's
_ALL_SIZES, _MOST = 0, -1  # places on the axes of sizes and of detections per image and class: all; 100
_IOU_50, _IOU_75 = 0, 5  # places on the axis of overlaps


class _Image(NamedTuple):
    """What was true and what was found in one image; masks are run-length encoded."""

    image_id: int
    size: tuple[int, int]
    truth: list[dict[str, Any]]
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None


class Evaluator:
    """Takes images one by one, on any number of ranks, and says how good the detections are.

    Args:
        class_names: of the labels, in their order.
    """

    def __init__(self, class_names: list[str]) -> None:
        self.class_names = class_names
        self._images: dict[int, _Image] = {}
        self._precision: dict[str, np.ndarray] | None = None

    def add(self, image_id: int, size: tuple[int, int], truth: list[dict[str, Any]], found: Found) -> None:
        """Take an image of `size` (height, width) as stored.

        Args:
            truth: its annotations as in a shard (data_prep/dense_set.py), crowds among them.
            found: boxes in pixels of the image as stored. COCO counts the 100 best of each class.

        Raises:
            ValueError: the image was added before, or what was found is not finite.
        """
        boxes, scores = (each.detach().cpu().float() for each in (found.boxes, found.scores))
        if not (torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
            raise ValueError(
                f"image {image_id}: boxes or scores that were found are not finite: the weights have diverged; "
                "evaluate an earlier checkpoint"
            )
        masks = None if found.masks is None else _encoded(found.masks.detach().cpu().float(), boxes, size)
        labels = found.labels.detach().cpu().numpy()
        assert not labels.size or 0 <= labels.min() <= labels.max() < len(self.class_names)
        self._take(_Image(image_id, size, truth, boxes.numpy(), scores.numpy(), labels, masks))

    def parts(self) -> list[_Image]:
        """What was added here, to be sent to another rank."""
        return list(self._images.values())

    def merge(self, parts: Sequence[_Image]) -> None:
        """Add another rank's `parts`; in which order ranks are merged does not matter. Raises ValueError as `add`."""
        for image in parts:
            self._take(image)

    def results(self) -> dict[str, float]:
        """`box_ap` (IoU .50 to .95), `box_ap50`, `box_ap75`, `box_ap_small`, `_medium`, `_large` in percent, and
        `mask_ap` and so on where masks were found and are known. What has no true object, of that size, is not there.

        Raises:
            ValueError: no image was added.
        """
        found = {}
        for kind, precision in self._evaluated().items():
            every = precision[..., _ALL_SIZES]
            parts = (every, every[_IOU_50], every[_IOU_75], *(precision[..., size] for size in (1, 2, 3)))
            for name, part in zip(RESULTS, parts, strict=True):
                mean = _mean(part)
                if mean is not None:
                    found[f"{kind}_{name}"] = mean
        return found

    def per_class(self) -> list[dict[str, Any]]:
        """By label: `class`, `annotations` (true objects, without crowds), `box_ap`, `mask_ap` in percent, or None.

        Raises ValueError as `results`.
        """
        evaluated = self._evaluated()
        counts = [0] * len(self.class_names)
        for image in self._images.values():
            for each in image.truth:
                counts[each["label"]] += not each["iscrowd"]

        def ap(kind: str, label: int) -> float | None:
            return _mean(evaluated[kind][:, :, label, _ALL_SIZES]) if kind in evaluated else None

        return [
            {"class": name, "annotations": counts[label], "box_ap": ap("box", label), "mask_ap": ap("mask", label)}
            for label, name in enumerate(self.class_names)
        ]

    def curves(self) -> dict[str, np.ndarray]:
        """`recall` (101,), 0 to 1, and the precision at each, 0 to 1, as the mean over classes with true objects: under
        `box_ap50`, `box_ap75`, and `box_ap` over all overlaps; of masks likewise. Each has the mean that `results` has
        by that name.

        Raises ValueError as `results`.
        """
        found = {"recall": np.linspace(0, 1, 101)}
        for kind, precision in self._evaluated().items():
            known = precision[..., _ALL_SIZES]
            known = known[:, :, (known > -1).any(axis=(0, 1))]  # (overlaps, recalls, classes)
            if known.shape[2]:
                for name, part in (("ap50", known[_IOU_50]), ("ap75", known[_IOU_75]), ("ap", known.mean(axis=0))):
                    found[f"{kind}_{name}"] = part.mean(axis=-1)
        return found

    def _take(self, image: _Image) -> None:
        if image.image_id in self._images:
            raise ValueError(f"image {image.image_id} was evaluated twice: each counts once, on one rank")
        self._images[image.image_id] = image
        self._precision = None

    def _evaluated(self) -> dict[str, np.ndarray]:
        """By kind, the precision (overlaps, recalls, classes, sizes) at 100 detections per image and class."""
        if not self._images:
            raise ValueError("no image was evaluated: the validation split is empty; rebuild the set with one")
        if self._precision is None:
            self._precision = {}
            with_masks = any(image.masks is not None for image in self._images.values()) and any(
                each["segmentation"] for image in self._images.values() for each in image.truth
            )
            for kind in ("box", "mask") if with_masks else ("box",):
                self._precision[kind] = self._precision_of(kind)
        return self._precision

    def _precision_of(self, kind: str) -> np.ndarray:
        true = COCO(
            {
                "images": [{"id": i.image_id, "height": i.size[0], "width": i.size[1]} for i in self._images.values()],
                "categories": [{"id": label, "name": name} for label, name in enumerate(self.class_names)],
                # Ids anew: the evaluator takes 0 for "not matched".
                "annotations": [{**each, "id": number} for number, each in enumerate(self._true(kind), 1)],
            }
        )
        evaluation = COCOeval_faster(true, true.loadRes(list(self._found(kind))), _KINDS[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        return np.asarray(evaluation.eval["precision"])[..., _MOST]

    def _true(self, kind: str) -> Iterator[dict[str, Any]]:
        for image in self._images.values():
            for each in image.truth:
                known = {"image_id": image.image_id, "category_id": each["label"]}
                known |= {name: each[name] for name in ("bbox", "area", "iscrowd")}
                if kind == "mask":
                    if each["segmentation"]:
                        known["segmentation"] = dict(each["segmentation"])
                    else:  # its mask is not known: what is found in the box counts neither way
                        known |= {"segmentation": coco_mask.frPyObjects([each["bbox"]], *image.size)[0], "iscrowd": 1}
                yield known

    def _found(self, kind: str) -> Iterator[dict[str, Any]]:
        """Of masks without boxes: with them, the size of a detection would be the box's."""
        for image in self._images.values():
            if kind == "box":
                sizes = image.boxes[:, 2:] - image.boxes[:, :2]
                places = [{"bbox": each} for each in np.concatenate([image.boxes[:, :2], sizes], 1).tolist()]
            else:
                places = [{"segmentation": each} for each in image.masks or []]
            for place, score, label in zip(places, image.scores.tolist(), image.labels.tolist(), strict=False):
                yield {"image_id": image.image_id, "category_id": label, "score": score, **place}


def _mean(precision: np.ndarray) -> float | None:
    """In percent, over classes that have true objects; None without any."""
    known = precision[precision > -1]
    return float(np.mean(known)) * 100 if known.size else None


def _encoded(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """(N, 28, 28) probabilities inside of (N, 4) -> run lengths of masks of the image. One at a time: as whole images
    of float32, a hundred take hundreds of megabytes.
    """
    found = []
    for mask, box in zip(masks, boxes, strict=True):
        pasted = paste_masks_in_image(mask[None, None], box[None], size)[0, 0] >= MASK_THRESHOLD
        found.append(coco_mask.encode(np.asfortranarray(pasted.numpy().astype(np.uint8))))
    return found
