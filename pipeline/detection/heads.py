"""What stands behind a pyramid in an R-CNN: anchors, cuts, and the layers that say whether, which, where, of what form.

Hidden layers are in the dtype of autocast, where it is on; what comes out is float32, since boxes of hundreds of pixels
and scores that get sorted are not to be rounded to eight bits. Parameters are in any dtype. Layers are torchvision's,
whose own (0.29.2) give what autocast makes of them; initial values are those of the published recipes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from pipeline.dense.layers import compute_maps, convolve
from pipeline.ops import products
from pipeline.ops.layers import linear

STRIDES = (4, 8, 16, 32, 64)  # of the pyramid's levels; proposals come from all, cuts from all but the last
ASPECTS = (0.5, 1.0, 2.0)
CUT, MASK_CUT = 7, 14  # sides of what is cut out of the maps
MASK_CONVOLUTIONS = 4
SAMPLED_POSITIVE = 0.25  # the share with objects of the boxes that a box head is trained on, at most
SCORE_MIN, OVERLAP_MAX = 0.05, 0.5  # of what is found; of two boxes of a class the better one is kept
LEVELS_CUT = len(STRIDES) - 1
_CANONICAL, _CANONICAL_LEVEL = 7, 2  # a box of seven finest anchors (224 px of 32) is cut from two levels above them


class Anchors(AnchorGenerator):
    """Boxes in float32 around every position of the pyramid, in three forms, at its levels' strides.

    torchvision 0.29.2 takes the maps' dtype, and for a stride image size // map size: 61 of stride 64 under 800 px.
    """

    def __init__(self, finest_px: float) -> None:
        sizes = tuple((finest_px * 2**level,) for level in range(len(STRIDES)))
        super().__init__(sizes, (ASPECTS,) * len(STRIDES))

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """For each image the same (anchors, 4), x0 y0 x1 y1."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        sizes = [list(each.shape[-2:]) for each in feature_maps]
        whole = torch.cat(self.grid_anchors(sizes, [[stride, stride] for stride in STRIDES]))
        return [whole] * len(image_list.image_sizes)


class Cut(nn.Module):
    """Cuts (N, C, side, side), float32, out of maps at boxes, each from the level that suits its size.

    As torchvision's MultiScaleRoIAlign (0.29.2), which however lies half a position off, and for good takes the maps'
    scales from the first image that it sees, wrong ones from one of 33 px.

    `forward`: maps (B, C, H, W) by level, "0" the finest; of each image boxes (N_i, 4), in its pixels; images' sizes.
    """

    def __init__(self, side: int, finest_px: float) -> None:
        super().__init__()
        self.side = side
        self.level_of = LevelMapper(0, LEVELS_CUT - 1, round(_CANONICAL * finest_px), _CANONICAL_LEVEL)

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        levels = self.level_of(boxes)
        images = [each.new_full((len(each), 1), image) for image, each in enumerate(boxes)]
        places = torch.cat([torch.cat(images), torch.cat(boxes)], 1)
        finest = maps["0"]
        cuts = finest.new_zeros(len(places), finest.shape[1], self.side, self.side, dtype=torch.float32)
        for level in range(LEVELS_CUT):
            chosen = torch.where(levels == level)[0]
            map_ = maps[str(level)].float()
            cuts[chosen] = roi_align(
                map_, places[chosen], self.side, 1 / STRIDES[level], sampling_ratio=2, aligned=True
            )
        return cuts


class ProposalHead(nn.Module):
    """Maps (B, channels, H, W) -> for each, the anchors' logits of an object (B, 3, H, W) and boxes (B, 12, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.logits = nn.Conv2d(channels, len(ASPECTS), 1)
        self.boxes = nn.Conv2d(channels, len(ASPECTS) * 4, 1)
        for layer in (self.conv, self.logits, self.boxes):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        with compute_maps(maps) as inputs:
            hidden = [convolve(map_, self.conv).relu().float() for map_ in inputs]
            return [convolve(x, self.logits) for x in hidden], [convolve(x, self.boxes) for x in hidden]


class BoxHidden(nn.Module):
    """Cuts (N, channels, 7, 7) -> two hidden layers (N, hidden), float32."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(channels * CUT**2, hidden), nn.Linear(hidden, hidden)
        for layer in (self.first, self.second):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, cuts: Tensor) -> Tensor:
        with compute_maps([cuts]) as (x,):
            for layer in (self.first, self.second):
                x = linear(x.flatten(1), layer.weight, layer.bias).relu()
            return x.float()


class BoxPredictor(nn.Module):
    """(N, hidden) -> logits (N, 1 + num_classes), the first of them for no object, and boxes (N, 4 * `boxes`)."""

    def __init__(self, hidden: int, num_classes: int, boxes: int) -> None:
        super().__init__()
        self.logits, self.boxes = nn.Linear(hidden, 1 + num_classes), nn.Linear(hidden, 4 * boxes)
        for layer, std in ((self.logits, 0.01), (self.boxes, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        with compute_maps([hidden]):
            logits, boxes = (linear(hidden, layer.weight, layer.bias) for layer in (self.logits, self.boxes))
            return logits, boxes


class MaskHidden(nn.Module):
    """Cuts (N, channels, 14, 14) -> (N, channels, 28, 28), float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(MASK_CONVOLUTIONS)])
        self.wider = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        for layer in (*self.convs, self.wider):
            nn.init.kaiming_normal_(cast(Tensor, layer.weight), mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, cuts: Tensor) -> Tensor:
        with compute_maps([cuts]) as (x,):
            for layer in self.convs:
                x = convolve(x, cast(nn.Conv2d, layer)).relu()
            x = x.float() if products.widens(x) else x
            bias = cast(Tensor, self.wider.bias).to(x.dtype)
            return F.conv_transpose2d(x, self.wider.weight.to(x.dtype), bias, stride=2).relu().float()


class MaskPredictor(nn.Module):
    """(N, channels, 28, 28) -> logits (N, 1 + num_classes, 28, 28), of which the first are of no class."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.logits = nn.Conv2d(channels, 1 + num_classes, 1)
        nn.init.normal_(self.logits.weight, std=0.001)
        nn.init.zeros_(cast(Tensor, self.logits.bias))

    def forward(self, hidden: Tensor) -> Tensor:
        with compute_maps([hidden]):
            return convolve(hidden, self.logits)
