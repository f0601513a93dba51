"""Three box heads in a row, each trained on what the one before made of its boxes, and for better ones.

Source: Cascade R-CNN, Cai and Vasconcelos 2018. torchvision 0.29.2 has none. As there: overlaps of .5, .6, .7, targets
scaled by ever more, boxes of no class, losses of 1, 1/2, 1/4, scores that are the mean over the three heads. Here the
boxes of an image are sampled once, before the first head; they go through all three. The published HorNets' heads
have four 3x3 convolutions with batch norm, boxes by class, and a mask head for each stage.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.roi_heads import maskrcnn_inference, maskrcnn_loss
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

from pipeline.config.detect import DetectionModel
from pipeline.detection.heads import (
    CUT,
    MASK_CUT,
    OVERLAP_MAX,
    SAMPLED_POSITIVE,
    SCORE_MIN,
    BoxHidden,
    BoxPredictor,
    Cut,
    MaskHidden,
    MaskPredictor,
)

OVERLAPS = (0.5, 0.6, 0.7)  # with a true box, of boxes that are taken for it
CODES = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
WEIGHTS = (1.0, 0.5, 0.25)  # of the losses
LEAST_PX = 1e-2  # sides of boxes; of smaller ones the next head would learn nothing

Target = dict[str, Tensor]


class CascadeHeads(nn.Module):
    """Called as torchvision's RoIHeads: (results in eval mode, losses in training).

    Losses, by stage 1 to 3: `loss_classifier_1` and `loss_box_reg_1`, sums over the boxes of the micro-batch divided by
    their number, times the stage's weight; `loss_mask` of the third head's positive boxes, as torchvision has it.
    """

    def __init__(self, model: DetectionModel, num_classes: int) -> None:
        super().__init__()
        hidden, self.detections = model.head_channels, model.detections
        self.cut = Cut(CUT, model.anchor_px)
        self.boxes = nn.ModuleList(
            [
                nn.Sequential(BoxHidden(model.channels, hidden), BoxPredictor(hidden, num_classes, boxes=1))
                for _ in OVERLAPS
            ]
        )
        self.mask_head: MaskHidden | None = None
        self.mask_predictor: MaskPredictor | None = None
        if model.masks:
            self.mask_cut = Cut(MASK_CUT, model.anchor_px)
            self.mask_head = MaskHidden(model.channels)
            self.mask_predictor = MaskPredictor(model.channels, num_classes)
        self.sampled = model.sampled
        self.coders = [BoxCoder(weights) for weights in CODES]
        self.sampler = BalancedPositiveNegativeSampler(model.sampled, SAMPLED_POSITIVE)

    def forward(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if targets is None:
            return self._found(maps, proposals, sizes), {}
        return [], self._losses(maps, self._sampled(proposals, targets), sizes, targets)

    def _losses(
        self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]], targets: list[Target]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for stage, coder in enumerate(self.coders):
            matches, labels = matched(boxes, targets, OVERLAPS[stage])
            logits, deltas = self.boxes[stage](self.cut(maps, boxes, sizes))
            wanted = [_true_boxes(target, match) for target, match in zip(targets, matches, strict=True)]
            codes, every = torch.cat(coder.encode(wanted, boxes)), torch.cat(labels)
            positive = every > 0
            off = F.smooth_l1_loss(deltas[positive], codes[positive], reduction="sum")
            count = max(len(every), 1)
            losses[f"loss_classifier_{stage + 1}"] = (
                WEIGHTS[stage] * F.cross_entropy(logits, every, reduction="sum") / count
            )
            losses[f"loss_box_reg_{stage + 1}"] = WEIGHTS[stage] * off / count
            if stage + 1 < len(self.coders):
                boxes = self._moved(stage, deltas, boxes, sizes)
                boxes = [each[remove_small_boxes(each, LEAST_PX)] for each in boxes]
        if self.mask_head is not None:
            losses["loss_mask"] = self._mask_loss(maps, boxes, sizes, matches, labels, targets)
        return losses

    def _sampled(self, proposals: list[Tensor], targets: list[Target]) -> list[Tensor]:
        """Of proposals and the true boxes among them at most 512 an image, of which a quarter may be positive."""
        boxes = [torch.cat([each, target["boxes"]]) for each, target in zip(proposals, targets, strict=True)]
        _, labels = matched(boxes, targets, OVERLAPS[0])
        positive, negative = self.sampler(labels)
        return [each[(p | n).bool()] for each, p, n in zip(boxes, positive, negative, strict=True)]

    def _mask_loss(
        self,
        maps: dict[str, Tensor],
        boxes: list[Tensor],
        sizes: list[tuple[int, int]],
        matches: list[Tensor],
        labels: list[Tensor],
        targets: list[Target],
    ) -> Tensor:
        most = int(self.sampled * SAMPLED_POSITIVE)  # of an image: more may have become positive than were sampled
        chosen = [torch.where(each > 0)[0][:most] for each in labels]
        boxes = [each[index] for each, index in zip(boxes, chosen, strict=True)]
        logits = self._mask_logits(maps, boxes, sizes)
        true_masks, true_labels = ([target[name] for target in targets] for name in ("masks", "labels"))
        chosen_matches = [each[index] for each, index in zip(matches, chosen, strict=True)]
        return maskrcnn_loss(logits, boxes, true_masks, true_labels, chosen_matches)

    def _mask_logits(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        assert self.mask_head is not None
        assert self.mask_predictor is not None
        return self.mask_predictor(self.mask_head(self.mask_cut(maps, boxes, sizes)))

    def _moved(self, stage: int, deltas: Tensor, boxes: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        """The boxes as a stage corrects them, clipped to their images, without gradient."""
        moved = self.coders[stage].decode(deltas.detach(), boxes)[:, 0].split([len(each) for each in boxes])
        return [clip_boxes_to_image(each, size) for each, size in zip(moved, sizes, strict=True)]

    def _found(
        self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        total: Tensor | None = None
        for stage in range(len(self.boxes)):
            logits, deltas = self.boxes[stage](self.cut(maps, boxes, sizes))
            scores = logits.softmax(-1) / len(self.boxes)
            total = scores if total is None else total + scores
            boxes = self._moved(stage, deltas, boxes, sizes)
        assert total is not None
        by_image = total[:, 1:].split([len(each) for each in boxes])
        results = [best(each, scores, self.detections) for each, scores in zip(boxes, by_image, strict=True)]
        if self.mask_head is not None:
            logits = self._mask_logits(maps, [each["boxes"] for each in results], sizes)
            for each, masks in zip(results, maskrcnn_inference(logits, [r["labels"] for r in results]), strict=True):
                each["masks"] = masks
        return results


def matched(boxes: list[Tensor], targets: list[Target], overlap: float) -> tuple[list[Tensor], list[Tensor]]:
    """For each image, which true box each of its boxes (N, 4) overlaps most (N,), and that one's label (N,), 0 where
    they overlap less than `overlap`.
    """
    matches, labels = [], []
    for each, target in zip(boxes, targets, strict=True):
        if len(target["boxes"]):
            best_overlap, match = box_iou(each, target["boxes"]).max(1)
            matches.append(match)
            labels.append(torch.where(best_overlap >= overlap, target["labels"][match], 0))
        else:
            matches.append(torch.zeros(len(each), dtype=torch.int64, device=each.device))
            labels.append(matches[-1])
    return matches, labels


def best(boxes: Tensor, scores: Tensor, most: int) -> dict[str, Tensor]:
    """Of boxes (N, 4) and their scores (N, num_classes) those above the least score, without what overlaps a better one
    of its class, `most` of them: `boxes`, `scores`, `labels` from 1, best first.
    """
    scores, labels = scores.flatten(), torch.arange(1, scores.shape[1] + 1, device=scores.device).repeat(len(boxes))
    boxes = boxes.repeat_interleave(scores.numel() // max(len(boxes), 1), 0)
    large = torch.zeros_like(scores, dtype=torch.bool)
    large[remove_small_boxes(boxes, LEAST_PX)] = True
    kept = torch.where((scores > SCORE_MIN) & large)[0]
    boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    kept = batched_nms(boxes, scores, labels, OVERLAP_MAX)[:most]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


def _true_boxes(target: Target, match: Tensor) -> Tensor:
    """(N, 4) of the matches (N,); of an image without objects none is asked for, and these are zeros."""
    boxes = target["boxes"]
    return boxes[match] if len(boxes) else boxes.new_zeros(len(match), 4)
