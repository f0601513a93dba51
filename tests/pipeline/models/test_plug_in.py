"""timm's ViT and ConvNeXt with gnConv: they train, and are timm models like others."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pipeline.models  # noqa: F401 (registers them)
from pipeline.ops.gnconv import GnConv

pytestmark = pytest.mark.usefixtures("one_thread")

NANO = [("vit_gnconv_nano", {}), ("vit_gnconv_nano", {"gnconv_filters": True}), ("convnext_gnconv_nano", {})]


def pictures() -> tuple[Tensor, Tensor]:
    """Stripes across and down, of a random phase: what no mean of colours tells apart."""
    torch.manual_seed(1)
    phase, wave = torch.rand(16, 1, 1) * 6.3, torch.arange(64) / 4
    down = torch.sin(wave[None, :, None] + phase).expand(16, 64, 64)
    labels = torch.arange(16) % 2
    stripes = torch.where(labels[:, None, None] == 0, down, down.transpose(1, 2))
    return stripes[:, None].expand(16, 3, 64, 64).contiguous(), labels


@pytest.mark.parametrize(("name", "options"), NANO)
def test_trains(name: str, options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2, **options).train()
    assert sum(isinstance(module, GnConv) for module in model.modules()) == len(
        [m for m in model.modules() if isinstance(m, timm.layers.Mlp)]
    )
    images, labels = pictures()
    optimizer = torch.optim.AdamW(param_groups_layer_decay(model, 0.05, layer_decay=0.9), lr=2e-3)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 4
    for step in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=step == 0):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), step
        optimizer.step()
        if loss < 0.05:
            break
    assert (model.eval()(images).argmax(1) == labels).all()


@pytest.mark.parametrize(("name", "options"), NANO)
def test_is_a_timm_model(name: str, options: dict[str, bool]) -> None:
    """Classifier, features of any size, checkpointing that changes nothing."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    x = torch.randn(2, 3, 64, 96)
    assert model(x).shape == (2, 5)
    assert model.get_classifier().out_features == 5
    model.reset_classifier(3)
    with torch.no_grad():
        expected = model(x)
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-4, atol=1e-5)
    features = timm.create_model(name, features_only=True, **options)
    for map_, channels, stride in zip(
        features(x), features.feature_info.channels(), features.feature_info.reduction(), strict=True
    ):
        assert map_.shape == (2, channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize("filters", ["7x7", "gf"])
def test_is_of_the_size_of_its_transformer(filters: str) -> None:
    """As many parameters as ViT-S within 3 %, and fewer multiply-adds: there are no products of all with all."""
    counts: list[tuple[float, float]] = []
    for name in (f"vit_gnconv_small_{filters}", "vit_small_patch16_224"):
        with torch.device("meta"):
            model = timm.create_model(name).eval()
            x = torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        counts.append((sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9))
        print(f"{name}: {counts[-1][0] / 1e6:.1f} M, {counts[-1][1]:.2f} GMACs")
    assert counts[0][0] == pytest.approx(counts[1][0], rel=0.03)
    assert 0.85 * counts[1][1] < counts[0][1] < counts[1][1]
