"""HorNet as the backbone of models of transformers, segmentation_models_pytorch and torchvision, at an odd size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import (
    AutoBackbone,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from pipeline.models.wrapped import hornet_within, layer_matcher, load_backbone
from pipeline.ops import recompute

pytestmark = pytest.mark.usefixtures("one_thread")

Loss = Callable[[Tensor], Tensor]
NAME, WIDTHS = "hornet_nano_gf", (16, 32, 96, 192)
HEIGHT, WIDTH = 100, 140


class Features(nn.Module):
    """torchvision asks a backbone for named maps of `out_channels`."""

    out_channels = 16

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model(NAME, features_only=True)
        self.fpn = FeaturePyramidNetwork(WIDTHS, self.out_channels, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = OrderedDict((str(i), map_) for i, map_ in enumerate(self.body(x)))
        return self.fpn(maps)


def backbone() -> TimmBackboneConfig:
    return TimmBackboneConfig(backbone=NAME, out_indices=[0, 1, 2, 3])


def mask2former() -> tuple[nn.Module, Loss]:
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=backbone(),
            **sizes,
            **dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 16),
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=5,
            num_labels=3,
            train_num_points=64,
        )
    )
    masks, classes = (torch.rand(2, HEIGHT, WIDTH) > 0.5).float(), torch.tensor([0, 1])
    return model, lambda x: model(pixel_values=x, mask_labels=[masks] * 2, class_labels=[classes] * 2).loss


def upernet() -> tuple[nn.Module, Loss]:
    config = UperNetConfig(
        backbone_config=backbone(), hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=96, num_labels=3
    )
    model = UperNetForSemanticSegmentation(config)
    return model, lambda x: model(x, labels=torch.randint(0, 3, (2, HEIGHT, WIDTH))).loss


def smp_unet() -> tuple[nn.Module, Loss]:
    model = smp.Unet(f"tu-{NAME}", encoder_weights=None, classes=3)
    return model, lambda x: model(x).square().mean()


def smp_fpn() -> tuple[nn.Module, Loss]:
    """It asks for multiples of 32 itself."""
    model = smp.FPN(f"tu-{NAME}", encoder_weights=None, classes=3)
    return model, lambda x: model(x[..., :96, :128]).square().mean()


def smp_deeplab() -> tuple[nn.Module, Loss]:
    """Of stride 16, by dilation; it asks for multiples of 16."""
    model = smp.DeepLabV3Plus(f"tu-{NAME}", encoder_weights=None, classes=3, encoder_output_stride=16)
    return model, lambda x: model(x[..., :96, :112]).square().mean()


def faster_rcnn() -> tuple[nn.Module, Loss]:
    anchors = AnchorGenerator(tuple((8 * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
    model = FasterRCNN(Features(), 4, rpn_anchor_generator=anchors, min_size=100, max_size=140, size_divisible=1)
    box = {"boxes": torch.tensor([[10.0, 20.0, 70.0, 90.0]]), "labels": torch.tensor([1])}
    return model, lambda x: torch.stack(list(model(list(x), [box, box]).values())).sum()


@pytest.mark.parametrize(
    ("build", "prefix"),
    [
        (mask2former, "model.pixel_level_module.encoder._backbone.model."),
        (upernet, "backbone._backbone.model."),
        (smp_unet, "encoder.model.model."),
        (smp_fpn, "encoder.model.model."),
        (smp_deeplab, "encoder.model.model."),
        (faster_rcnn, "backbone.body.model."),
    ],
)
def test_trains_inside(build: Callable[[], tuple[nn.Module, Loss]], prefix: str, monkeypatch) -> None:
    """A step gives each weight of the net its gradient, by the operators that keep less; groups by layer; weights."""
    torch.manual_seed(0)
    model, loss = build()
    found, net = hornet_within(model)
    assert found == prefix
    net.set_checkpointing("selective")
    kept: list[bool] = []
    gelu_linear = recompute.gelu_linear
    monkeypatch.setattr(recompute, "gelu_linear", lambda h, w, b, keep: kept.append(keep) or gelu_linear(h, w, b, keep))
    loss(torch.randn(2, 3, HEIGHT, WIDTH)).backward()
    assert kept == [False] * 7  # one a block
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())

    layers = layer_matcher(model)
    assert [layers(prefix + name) for name in ("downsample_layers.0.0.weight", "stages.2.3.gamma1")] == [0, 4]
    model.group_matcher = lambda coarse=False: layer_matcher(model, coarse)
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    own = {id(p) for p in net.parameters()}
    assert {scale[id(p)] for p in model.parameters() if p.requires_grad and id(p) not in own} == {1.0}
    assert scale[id(net.downsample_layers[0][0].weight)] == 0.5**6  # timm leaves out layers that nano has not

    source = timm.create_model(NAME, num_classes=7, img_size=96)
    load_backbone(model, source.state_dict())
    assert torch.equal(net.stages[3][0].pwconv1.weight, source.stages[3][0].pwconv1.weight)
    assert net.stages[2][0].gnconv.dwconv.complex_weight.shape[1:] == (4, 3, 2)


@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [1, 3], [1, 2], [3]])
def test_hidden_states(indices: list[int]) -> None:
    """Of all stages up to the last that is asked for; maps are the same as without."""
    model = AutoBackbone.from_config(TimmBackboneConfig(backbone=NAME, out_indices=indices)).eval()
    x = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        both, maps = model(x, output_hidden_states=True), model(x).feature_maps
    assert [h.shape[1] for h in both.hidden_states] == list(WIDTHS[: indices[-1] + 1])
    assert len(maps) == len(indices)
    for ours, asked, i in zip(both.feature_maps, maps, indices, strict=True):
        assert torch.equal(ours, asked)
        assert torch.equal(ours, both.hidden_states[i])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="Linear should hold one HorNet, it holds none"):
        hornet_within(nn.Linear(2, 2))
    net = timm.create_model(NAME)
    with pytest.raises(ValueError, match=r"it holds 0, 1: pass the one"):
        hornet_within(nn.ModuleList([net, timm.create_model(NAME)]))
    state = net.state_dict()
    del state["stages.2.1.gamma1"]
    with pytest.raises(ValueError, match=r"1 weights of the net are not in the state, stages\.2\.1\.gamma1"):
        load_backbone(net, state)
