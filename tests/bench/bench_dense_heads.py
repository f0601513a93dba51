"""Parameters and FLOPs of HorNet with decoders for dense tasks, beside those that were published.

    python tests/bench/bench_dense_heads.py [--models tiny small base large] [--filters 7x7 gf]

- UPerNet and GN-UPerHead: 512 channels, 150 classes, on 512x2048 (L: 640x2560). Parameters with the auxiliary head,
  which training alone has; FLOPs without it.
- FPN and HorFPN: 256 channels, five levels, within Cascade Mask R-CNN on 1280x800, with 1000 proposals, of which 100
  get a mask: what the published numbers were counted with (see `DetectorHeads`).

FLOPs are multiply-adds of convolutions and matrix products, on the meta device: no time is measured, no memory needed.
A 7x7 decoder stands on a 7x7 net, one with global filters on a GF net. Transforms by FFT are counted nowhere. The GF
nets' stored filters are of 384 px in UPerNet and in L's detector, else of 224 px, as published.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

import pipeline.models  # noqa: F401 (registers the family)
from pipeline.dense.fpn import FeaturePyramid
from pipeline.dense.uper_head import FcnHead, UperHead

FILTER = (32, 17)  # of the published GF decoders
CLASSES, THINGS = 150, 80
PROPOSALS, MASKS = 1000, 100


class Published(NamedTuple):
    """Parameters in millions, multiply-adds in 1e9."""

    params: float
    gmacs: float


# Source: the tables of the released code; decoders with gnConvs have no such row there.
UPERNET = {
    ("tiny", "7x7"): Published(52, 926),
    ("tiny", "gf"): Published(55, 924),
    ("small", "7x7"): Published(81, 1030),
    ("small", "gf"): Published(85, 1027),
    ("base", "7x7"): Published(121, 1174),
    ("base", "gf"): Published(126, 1171),
    ("large", "7x7"): Published(232, 2473),
    ("large", "gf"): Published(239, 2465),
}
CASCADE = {
    ("tiny", "7x7"): Published(80, 730),
    ("tiny", "gf"): Published(80, 728),
    ("small", "7x7"): Published(107, 830),
    ("small", "gf"): Published(108, 827),
    ("base", "7x7"): Published(144, 969),
    ("base", "gf"): Published(146, 965),
    ("large", "7x7"): Published(251, 1363),
    ("large", "gf"): Published(259, 1358),
}


class BoxHead(nn.Module):
    """Four 3x3 convolutions with batch norm, a hidden layer, scores and boxes for each class, of 7x7 cuts."""

    def __init__(self) -> None:
        super().__init__()
        convs = [(nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()) for _ in range(4)]
        self.convs = nn.Sequential(
            *(layer for conv in convs for layer in conv), nn.Flatten(), nn.Linear(256 * 49, 1024)
        )
        self.scores, self.boxes = nn.Linear(1024, THINGS + 1), nn.Linear(1024, 4 * THINGS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convs(x).relu()
        return self.scores(x), self.boxes(x)


class DetectorHeads(nn.Module):
    """What stands behind the pyramid in Cascade Mask R-CNN: proposals, three box heads, three mask heads."""

    def __init__(self) -> None:
        super().__init__()
        self.proposals = RPNHead(256, 3)
        self.boxes = nn.ModuleList([BoxHead() for _ in range(3)])
        masks = [(MaskRCNNHeads(256, [256] * 4, 1), MaskRCNNPredictor(256, 256, THINGS)) for _ in range(3)]
        self.masks = nn.ModuleList([nn.Sequential(*each) for each in masks])

    def forward(self, maps: list[Tensor]) -> None:
        self.proposals(maps)
        for boxes, masks in zip(self.boxes, self.masks, strict=True):
            boxes(maps[0].new_empty(PROPOSALS, 256, 7, 7))
            masks(maps[0].new_empty(MASKS, 256, 14, 14))


def counted(parts: Sequence[nn.Module], size: tuple[int, int], beside: Sequence[nn.Module] = ()) -> Published:
    """Of `parts` in turn on an image of `size`; `beside` adds its parameters alone."""
    x: object = torch.empty(1, 3, *size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for part in parts:
            x = part.eval()(x)
    params = sum(p.numel() for part in (*parts, *beside) for p in part.parameters())
    return Published(params / 1e6, counter.get_total_flops() / 2e9)


def row(name: str, decoder: str, found: Published, published: Published | None) -> str:
    if published is None:
        return f"| {name} | {decoder} | {found.params:.1f} | | {found.gmacs:.0f} | | |"
    off = max(abs(a / b - 1) for a, b in zip(found, published, strict=True))
    return (
        f"| {name} | {decoder} | {found.params:.1f} | {published.params:.0f} | {found.gmacs:.0f} "
        f"| {published.gmacs:.0f} | {off:.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "small", "base", "large"])
    parser.add_argument("--filters", nargs="+", default=["7x7", "gf"])
    args = parser.parse_args()
    print("| HorNet | decoder | M parameters | published | GMACs | published | furthest off |\n|" + "---|" * 7)
    for model in args.models:
        for kind in args.filters:
            name, size = f"hornet_{model}_{kind}", (640, 2560) if model == "large" else (512, 2048)
            gf, gf_384 = ({"img_size": px} if kind == "gf" else {} for px in (384 if model == "large" else 224, 384))
            with torch.device("meta"):
                net = timm.create_model(name, features_only=True, **gf)
                net_384 = timm.create_model(name, features_only=True, **gf_384)
                channels = net.feature_info.channels()
                auxiliary, heads = FcnHead(channels[2], 256, CLASSES), DetectorHeads()
                for gnconv in (False, True):
                    filters = FILTER if gnconv and kind == "gf" else None
                    uper = UperHead(channels, 512, CLASSES, gnconv, filters)
                    pyramid = FeaturePyramid(channels, 256, gnconv, filters)
                    uper_name, pyramid_name = ("GN-UPerHead", "HorFPN") if gnconv else ("UPerNet", "FPN")
                    published = None if gnconv else UPERNET[model, kind]
                    print(row(name, uper_name, counted([net_384, uper], size, [auxiliary]), published))
                    published = None if gnconv else CASCADE[model, kind]
                    print(row(name, pyramid_name, counted([net, pyramid, heads], (800, 1280)), published), flush=True)


if __name__ == "__main__":
    main()
