"""R-CNNs: HorNet's four maps under a pyramid; proposals on it; a head that looks at each of them again.

Source: Faster R-CNN, Ren et al. 2015; Mask R-CNN, He et al. 2017; Feature Pyramid Networks, Lin et al. 2017. Matching,
sampling, losses and suppression are torchvision's, with the figures of the published recipes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from pipeline.config.detect import DetectionModel
from pipeline.dense.fpn import FeaturePyramid
from pipeline.detection.base import Detector
from pipeline.detection.cascade import CascadeHeads
from pipeline.detection.heads import (
    CUT,
    MASK_CUT,
    OVERLAP_MAX,
    SAMPLED_POSITIVE,
    SCORE_MIN,
    Anchors,
    BoxHidden,
    BoxPredictor,
    Cut,
    MaskHidden,
    MaskPredictor,
    ProposalHead,
)
from pipeline.detection.scenes import Found, Objects

PROPOSALS = {"training": 1000, "testing": 1000}  # of an image, after suppression
CANDIDATES = {"training": 2000, "testing": 1000}  # of a level, before


class RegionDetector(Detector):
    """Mask R-CNN, or Faster R-CNN without masks, with one box head or a cascade of three.

    Losses: `loss_objectness`, `loss_rpn_box_reg` (means over 256 anchors an image), `loss_classifier`, `loss_box_reg`
    (over `sampled` proposals an image) of the one head, `loss_mask` (over positive ones); for a cascade's see there.

    Args:
        model: see `DetectionModel`.
        num_classes: of the data set.
        resolution: see `Detector`.
    """

    def __init__(self, model: DetectionModel, num_classes: int, resolution: int) -> None:
        super().__init__(model, resolution, [0, 1, 2, 3])
        self.with_masks, self.sampled = model.masks, model.sampled
        self.pyramid = FeaturePyramid(self.widths, model.channels, gnconv=model.pyramid == "horfpn")
        self.proposals = RegionProposalNetwork(
            Anchors(model.anchor_px),
            ProposalHead(model.channels),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=CANDIDATES,
            post_nms_top_n=PROPOSALS,
            nms_thresh=0.7,
        )
        make = CascadeHeads if model.head == "cascade-mask-rcnn" else _one_head
        self.heads: nn.Module = make(model, num_classes)

    def losses(self, images: Tensor, objects: Sequence[Objects]) -> dict[str, Tensor]:
        targets = [self._target(each) for each in objects]
        sizes = [(images.shape[2], images.shape[3])] * len(images)
        maps = self._pyramid_of(images)
        proposals, losses = self.proposals(ImageList(images, sizes), maps, targets)
        return {**losses, **self.heads(maps, proposals, sizes, targets)[1]}

    def find(self, images: Tensor, size: tuple[int, int]) -> list[Found]:
        sizes = [size] * len(images)
        maps = self._pyramid_of(images)
        proposals, _ = self.proposals(ImageList(images, sizes), maps)
        results, _ = self.heads(maps, proposals, sizes)
        return [
            Found(each["boxes"], each["scores"], each["labels"] - 1, each["masks"][:, 0] if self.with_masks else None)
            for each in results
        ]

    def dry_run(self, images: Tensor) -> None:
        maps = self._pyramid_of(images)
        self.proposals.head(list(maps.values()))
        channels, boxes = maps["0"].shape[1], len(images) * self.sampled
        cuts = images.new_empty(boxes, channels, CUT, CUT)
        heads: Any = self.heads
        passes = (
            heads.boxes if isinstance(heads, CascadeHeads) else [nn.Sequential(heads.box_head, heads.box_predictor)]
        )
        for each in passes:
            each(cuts)
        if self.with_masks:
            cuts = images.new_empty(int(boxes * SAMPLED_POSITIVE), channels, MASK_CUT, MASK_CUT)
            heads.mask_predictor(heads.mask_head(cuts))

    def _pyramid_of(self, images: Tensor) -> dict[str, Tensor]:
        """By torchvision's names, in float32: it computes boxes in the dtype of the maps."""
        return {str(level): map_.float() for level, map_ in enumerate(self.pyramid(self.maps(images)))}

    def _target(self, objects: Objects) -> dict[str, Tensor]:
        """As torchvision has it, whose label 0 is none."""
        target = {"boxes": objects.boxes.float(), "labels": objects.labels + 1}
        if self.with_masks:
            if objects.masks is None:
                raise ValueError("model.masks is true, and an image came without masks of its objects: set it to false")
            target["masks"] = objects.masks
        return target


def _one_head(model: DetectionModel, num_classes: int) -> RoIHeads:
    return RoIHeads(
        box_roi_pool=Cut(CUT, model.anchor_px),
        box_head=BoxHidden(model.channels, model.head_channels),
        box_predictor=BoxPredictor(model.head_channels, num_classes, boxes=1 + num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=model.sampled,
        positive_fraction=SAMPLED_POSITIVE,
        bbox_reg_weights=None,
        score_thresh=SCORE_MIN,
        nms_thresh=OVERLAP_MAX,
        detections_per_img=model.detections,
        mask_roi_pool=Cut(MASK_CUT, model.anchor_px) if model.masks else None,
        mask_head=MaskHidden(model.channels) if model.masks else None,
        mask_predictor=MaskPredictor(model.channels, num_classes) if model.masks else None,
    )
