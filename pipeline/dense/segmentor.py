"""A net that segments: HorNet's four maps, normalised, under UPerNet's head, with a small second head while it trains,
or under Mask2Former's.

Source: HorNet, Rao et al. 2022, section 4.2 (semantic segmentation); UPerNet, Xiao et al. 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.dense_set import IGNORED
from pipeline.config.dense import MASK2FORMER, SegmentationModel
from pipeline.dense.mask2former import Mask2FormerHead, Predictions, mask2former_loss
from pipeline.dense.uper_head import FcnHead, UperHead
from pipeline.models.build import build_model
from pipeline.models.wrapped import layer_matcher
from pipeline.ops.layers import NORM_EPS

AUXILIARY_CHANNELS, AUXILIARY_STAGE = 256, 2


class Segmentor(nn.Module):
    """Logits of `num_classes` for each pixel of a grid of stride 4; with Mask2Former's head, of the image.

    Args:
        model: backbone and head, as the configuration has them.
        num_classes: of the data set.
        resolution: side of the crops, pixels: global filters are made for it.

    `forward`: images (B, 3, H, W), normalised, H and W at least 32 -> (B, num_classes, H // 4, W // 4) in eval mode;
    in training also the second head's (B, num_classes, H // 16, W // 16), where there is one. See `Mask2FormerHead` for
    what that one gives.
    """

    def __init__(self, model: SegmentationModel, num_classes: int, resolution: int) -> None:
        super().__init__()
        self.backbone = build_model(model, 0, resolution)
        self.backbone.prune_intermediate_layers([0, 1, 2, 3], prune_norm=True)
        widths = [int(info["num_chs"]) for info in self.backbone.feature_info]
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=NORM_EPS) for width in widths])
        self.head: nn.Module
        if model.head == MASK2FORMER:
            self.head = Mask2FormerHead(widths, model.head_channels, num_classes)
        else:
            self.head = UperHead(widths, model.head_channels, num_classes, gnconv=model.head == "gn-uper")
        self.auxiliary: FcnHead | None = None
        if model.auxiliary_weight:
            channels = min(AUXILIARY_CHANNELS, model.head_channels)
            self.auxiliary = FcnHead(widths[AUXILIARY_STAGE], channels, num_classes)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor] | Predictions:
        maps = cast(list[Tensor], self.backbone.forward_intermediates(images, intermediates_only=True))
        maps = [norm(map_.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, map_ in zip(self.norms, maps, strict=True)]
        logits = self.head(maps)
        if self.training and self.auxiliary is not None:
            return logits, self.auxiliary(maps[AUXILIARY_STAGE])
        return logits

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layer of each parameter name, for timm's layer-wise learning-rate decay: heads and norms are the last."""
        return layer_matcher(self, coarse)


def segmentation_loss(model: SegmentationModel, num_classes: int) -> Callable[..., Tensor]:
    """Of what a Segmentor returns in training against masks (B, H, W)."""
    return mask2former_loss(num_classes) if model.head == MASK2FORMER else pixel_loss(model.auxiliary_weight)


def pixel_loss(auxiliary_weight: float) -> Callable[[Tensor | Sequence[Tensor], Tensor], Tensor]:
    """Cross-entropy of a Segmentor's logits against masks (B, H, W), summed over pixels that have a label and divided
    by all: as published, and no sum over micro-batches hangs on how a batch is divided.
    """

    def of(logits: Tensor, masks: Tensor) -> Tensor:
        logits = F.interpolate(logits.float(), masks.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum") / masks.numel()

    def loss(outputs: Tensor | Sequence[Tensor], masks: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):
            return of(outputs, masks)
        logits, auxiliary = outputs
        return of(logits, masks) + auxiliary_weight * of(auxiliary, masks)

    return loss
