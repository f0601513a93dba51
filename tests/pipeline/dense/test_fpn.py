"""The feature pyramid against torchvision's, HorFPN against its own statement, and both in torchvision's detector."""

from __future__ import annotations

import re
from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pipeline.dense.fpn import FeaturePyramid, PyramidBackbone

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = (8, 16, 24, 32)


def maps_of(height: int, width: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [
        torch.randn(2, c, height // s, width // s, dtype=torch.float64)
        for c, s in zip(WIDTHS, (4, 8, 16, 32), strict=True)
    ]


def test_plain_is_that_of_torchvision() -> None:
    torch.manual_seed(0)
    theirs = FeaturePyramidNetwork(WIDTHS, 16, LastLevelMaxPool()).double()
    ours = FeaturePyramid(WIDTHS, 16).double()
    names = {"inner_blocks": "laterals", "layer_blocks": "levels"}
    state = {
        re.sub(r"^(\w+)\.(\d)\.0", lambda m: f"{names[m[1]]}.{m[2]}", k): v for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(state, strict=True)
    maps = maps_of(100, 140)
    expected = theirs(OrderedDict((str(i), each) for i, each in enumerate(maps)))
    for found, wanted in zip(ours(maps), expected.values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("filter_size", [None, (4, 3)])
def test_horfpn(filter_size: tuple[int, int] | None) -> None:
    """A gnConv of order 2, not scaled, where a level's 3x3 convolution was: written out for the 7x7."""
    torch.manual_seed(0)
    model = FeaturePyramid(WIDTHS, 16, gnconv=True, filter_size=filter_size, extra_levels=2).double()
    maps = maps_of(100, 140)
    outputs = model(maps)
    assert [tuple(each.shape[2:]) for each in outputs] == [(25, 35), (12, 17), (6, 8), (3, 4), (2, 2), (1, 1)]
    outputs[0].square().sum().backward()
    assert all(p.grad is not None for p in (*model.laterals.parameters(), *model.levels[0].parameters()))
    if filter_size is not None:
        return
    gnconv = model.levels[2].gnconv
    x = model.laterals[2](maps[2]) + F.interpolate(model.laterals[3](maps[3]), (6, 8))
    gate, context = gnconv.proj_in(x).split((8, 24), 1)
    first, second = F.conv2d(context, gnconv.dwconv.weight, gnconv.dwconv.bias, padding=3, groups=24).split((8, 16), 1)
    expected = gnconv.proj_out(gnconv.pws[0](gate * first) * second)
    torch.testing.assert_close(outputs[2], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gnconv", [False, True])
def test_a_detector_trains(gnconv: bool) -> None:
    torch.manual_seed(0)
    body = timm.create_model("hornet_nano_gf", features_only=True)
    pyramid = FeaturePyramid(body.feature_info.channels(), 16, gnconv=gnconv)
    anchors = AnchorGenerator(tuple((8 * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
    model = FasterRCNN(
        PyramidBackbone(body, pyramid),
        4,
        rpn_anchor_generator=anchors,
        min_size=100,
        max_size=140,
        size_divisible=1,
    )
    box = {"boxes": torch.tensor([[10.0, 20.0, 70.0, 90.0]]), "labels": torch.tensor([1])}
    losses = model(list(torch.randn(2, 3, 100, 140)), [box, box])
    torch.stack(list(losses.values())).sum().backward()
    parts: list[nn.Module] = [body, pyramid.laterals, pyramid.levels[0]]
    assert all(p.grad is not None and p.grad.isfinite().all() for part in parts for p in part.parameters())
    with pytest.raises(ValueError, match="set gnconv=True"):
        FeaturePyramid(WIDTHS, 16, filter_size=(4, 3))
