"""UPerNet's head over four maps, its twin with a gnConv, and the auxiliary head of the recipe.

Source: Unified Perceptual Parsing for Scene Understanding, Xiao et al. 2018; HorNet, Rao et al. 2022, section 3.3 and
its settings for ADE20K: 512 channels, pools of 1, 2, 3 and 6, an auxiliary head of 256 channels on the third map whose
loss counts 0.4, dropout of 0.1 in both. Norms: see `layers`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.dense.layers import Classifier, ConvNorm, GnConvNorm, compute_maps, init_children, resized

POOLS = (1, 2, 3, 6)


class UperHead(nn.Module):
    """Pyramid pooling of the last map, a top-down path, all levels fused, and a classifier of every position.

    Args:
        in_channels: of the maps, the finest first.
        channels: of the decoder.
        num_classes: of the logits.
        gnconv: GN-UPerHead: a gnConv in the place of the 3x3 convolution that fuses the levels once they are joined,
            from which the classes are read. (HorNet changes this one alone; those of each level stay.)
        filter_size: (h, w) of that gnConv's stored global filter (the published GF decoder: 32 and 17), or None for a
            7x7 depthwise convolution.
        dropout: share of channels dropped before the classifier, drawn from the CPU's generator.

    Raises:
        ValueError: `channels` does not suit a gnConv, or a filter without one.

    `forward`: maps (B, C_i, H_i, W_i), the finest first -> logits (B, num_classes, H_0, W_0).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        gnconv: bool = False,
        filter_size: tuple[int, int] | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if filter_size is not None and not gnconv:
            raise ValueError(f"filter_size={filter_size} is that of a gnConv: set gnconv=True, or leave it out")
        *finer, last = in_channels
        self.pools = nn.ModuleList([ConvNorm(last, channels, 1) for _ in POOLS])
        self.pooled = ConvNorm(last + len(POOLS) * channels, channels, 3)
        self.laterals = nn.ModuleList([ConvNorm(each, channels, 1) for each in finer])
        self.levels = nn.ModuleList([ConvNorm(channels, channels, 3) for _ in finer])
        joined = len(in_channels) * channels
        self.fusion = GnConvNorm(joined, channels, filter_size) if gnconv else ConvNorm(joined, channels, 3)
        self.classifier = Classifier(channels, num_classes, dropout)
        self.init_weights()

    def init_weights(self) -> None:
        """Set every parameter to its initial value; for a head built on `meta`, call it after `to_empty`."""
        init_children(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        with compute_maps(maps) as inputs:
            *finer, last = inputs
            x = self._pyramid(last)
            outputs = [x]
            for map_, lateral, level in reversed(list(zip(finer, self.laterals, self.levels, strict=True))):
                y = lateral(map_)
                x = y + resized(x, y)
                outputs.insert(0, level(x))
            x = torch.cat([resized(each, outputs[0]) for each in outputs], 1)
            return self.classifier(self.fusion(x))

    def _pyramid(self, x: Tensor) -> Tensor:
        """The last map beside its means over ever smaller parts of it, each through a layer of its own."""
        means = [resized(pool(F.adaptive_avg_pool2d(x, n)), x) for pool, n in zip(self.pools, POOLS, strict=True)]
        return self.pooled(torch.cat([x, *means], 1))


class FcnHead(nn.Module):
    """A 3x3 convolution and a classifier: one map (B, in_channels, H, W) -> logits (B, num_classes, H, W).

    The auxiliary head, which training alone looks at. `dropout`: see `UperHead`.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv = ConvNorm(in_channels, channels, 3)
        self.classifier = Classifier(channels, num_classes, dropout)
        self.init_weights()

    def init_weights(self) -> None:
        """See `UperHead`."""
        init_children(self)

    def forward(self, x: Tensor) -> Tensor:
        with compute_maps([x]) as (x,):
            return self.classifier(self.conv(x))
