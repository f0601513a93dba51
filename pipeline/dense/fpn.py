"""The feature pyramid of detectors and HorFPN, its twin with gnConvs, and both behind a backbone as torchvision asks.

Source: Feature Pyramid Networks for Object Detection, Lin et al. 2017; HorNet, Rao et al. 2022, section 3.3: each 3x3
convolution behind the top-down pathway becomes a gnConv of order 2. Without norms and activations, as published.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.dense.layers import compute_maps, convolve
from pipeline.models.plug_in import GnConvOnMaps


class FeaturePyramid(nn.Module):
    """FPN or HorFPN: maps (B, C_i, H_i, W_i), the finest first -> as many of `channels`, and coarser ones.

    Args:
        in_channels: of the maps, the finest first.
        channels: of all that comes out.
        gnconv: HorFPN.
        filter_size: (h, w) of the gnConvs' stored global filters (the published GF decoder: 32 and 17), or None for 7x7
            depthwise convolutions.
        extra_levels: coarser maps, each every second row and column of the one before.

    Raises:
        ValueError: `channels` does not suit a gnConv, or a filter without one.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 256,
        gnconv: bool = False,
        filter_size: tuple[int, int] | None = None,
        extra_levels: int = 1,
    ) -> None:
        super().__init__()
        if filter_size is not None and not gnconv:
            raise ValueError(f"filter_size={filter_size} is that of gnConvs: set gnconv=True, or leave it out")
        self.extra_levels = extra_levels
        self.laterals = nn.ModuleList([nn.Conv2d(each, channels, 1) for each in in_channels])
        self.levels = nn.ModuleList(
            [
                GnConvOnMaps(channels, channels, filter_size) if gnconv else nn.Conv2d(channels, channels, 3, padding=1)
                for _ in in_channels
            ]
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Set every parameter to its initial value; for a pyramid built on `meta`, call it after `to_empty`."""
        for level in self.levels:
            if isinstance(level, GnConvOnMaps):
                level.init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        with compute_maps(maps) as inputs:
            sums: list[Tensor] = []
            for map_, lateral in reversed(list(zip(inputs, self.laterals, strict=True))):
                x = convolve(map_, cast(nn.Conv2d, lateral))
                if sums:
                    x = x + F.interpolate(sums[0], size=x.shape[2:], mode="nearest")
                sums.insert(0, x)
            outputs = [
                level(x) if isinstance(level, GnConvOnMaps) else convolve(x, cast(nn.Conv2d, level))
                for x, level in zip(sums, self.levels, strict=True)
            ]
            for _ in range(self.extra_levels):
                outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
            return outputs


class PyramidBackbone(nn.Module):
    """A net of maps (timm's, made with `features_only=True`) and a pyramid: a backbone of torchvision's detectors.

    (B, 3, H, W) -> maps by the names "0", "1", ..., of `out_channels` channels, the finest first.
    """

    def __init__(self, body: nn.Module, pyramid: FeaturePyramid) -> None:
        super().__init__()
        self.body, self.pyramid = body, pyramid
        self.out_channels = cast(nn.Conv2d, pyramid.laterals[0]).out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.pyramid(self.body(x))
        return OrderedDict((str(i), map_) for i, map_ in enumerate(maps))
