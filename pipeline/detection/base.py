"""What all detectors are: HorNet's maps, each normalised; losses in training, what was found in evaluation."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.dense import STRIDE_PX
from pipeline.config.detect import DetectionModel
from pipeline.detection.scenes import Found, Objects, Scenes
from pipeline.models.build import build_model
from pipeline.models.wrapped import layer_matcher
from pipeline.ops.layers import NORM_EPS


class Detector(nn.Module, ABC):
    """A backbone, a norm for each map, and a head that a subclass has.

    In training `forward` takes Scenes and returns losses by name, float32, whose sum is the loss. In eval mode it takes
    images (B, 3, H, W), normalised, of any size, and returns what was found in each. What is drawn at random comes from
    torch's state. Every parameter gets a gradient, also where no image has an object.

    Args:
        model: backbone and head, as the configuration has them.
        resolution: side of the crops, pixels: global filters are made for it.
        stages: of the backbone, whose maps the head gets.
    """

    def __init__(self, model: DetectionModel, resolution: int, stages: Sequence[int]) -> None:
        super().__init__()
        # Of each number of boxes that it meets oneDNN (torch 2.15, on a CPU) keeps compiled primitives, 1024 in all:
        # gigabytes in an hour.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        self.backbone = build_model(model, 0, resolution)
        self.backbone.prune_intermediate_layers(list(stages), prune_norm=True)
        self.stages = list(stages)
        self.widths = [int(self.backbone.feature_info[stage]["num_chs"]) for stage in stages]
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=NORM_EPS) for width in self.widths])

    def forward(self, scenes: Scenes | Tensor) -> dict[str, Tensor] | list[Found]:
        if self.training:
            assert isinstance(scenes, Scenes), "in training a detector takes Scenes"
            return self.losses(_padded(scenes.images), scenes.objects)
        assert isinstance(scenes, Tensor), "in eval mode a detector takes images"
        height, width = scenes.shape[-2:]
        return self.find(_padded(scenes), (height, width))

    @abstractmethod
    def losses(self, images: Tensor, objects: Sequence[Objects]) -> dict[str, Tensor]:
        """Of images (B, 3, H, W), sides multiples of 32."""

    @abstractmethod
    def find(self, images: Tensor, size: tuple[int, int]) -> list[Found]:
        """In images (B, 3, H, W), sides multiples of 32, of which (height, width) `size` are not padding."""

    @abstractmethod
    def dry_run(self, images: Tensor) -> None:
        """Put images (B, 3, H, W) through all layers, where as many boxes are looked at as training does at most: to
        count FLOPs on the meta device, on which no box can be chosen.
        """

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, C_i, H_i, W_i) of each stage, the finest first."""
        maps = cast(list[Tensor], self.backbone.forward_intermediates(images, self.stages, intermediates_only=True))
        return [norm(map_.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, map_ in zip(self.norms, maps, strict=True)]

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layer of each parameter name, for timm's layer-wise learning-rate decay: heads and norms are the last."""
        return layer_matcher(self, coarse)


def _padded(images: Tensor) -> Tensor:
    """To multiples of 32, to the right and below, with the mean colour, which is 0."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % STRIDE_PX, 0, -height % STRIDE_PX))
