"""Mask2Former's head on our maps: the library's own loss and result, given the same maps; what does not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from data_prep.dense_set import IGNORED
from pipeline.config.dense import SegmentationModel, SegmentConfig
from pipeline.config.load import load
from pipeline.config.sections import ConfigError
from pipeline.dense.mask2former import Mask2FormerHead, Predictions, _config
from pipeline.dense.preflight import preflight
from pipeline.dense.segmentor import Segmentor, segmentation_loss

pytestmark = pytest.mark.usefixtures("one_thread")

PX, CLASSES = 64, 3


def model(**more: object) -> SegmentationModel:
    wanted = {"name": "hornet_nano_gf", "drop_path_rate": 0.0, "layer_scale_init": 0.01, "checkpointing": "selective"}
    return SegmentationModel.model_validate(
        {**wanted, "head": "mask2former", "head_channels": 32, "auxiliary_weight": 0.0, **more}
    )


def segmentor() -> Segmentor:
    torch.manual_seed(0)
    return Segmentor(model(), CLASSES, PX).train()


def images() -> tuple[Tensor, Tensor]:
    """With rows that are ignored; the second image has only two of the classes."""
    draw = torch.Generator().manual_seed(3)
    masks = torch.zeros(2, PX, PX, dtype=torch.int64)
    masks[0, 10:30, 20:50] = 1
    masks[:, 40:, :20] = 2
    masks[:, :4] = IGNORED
    return torch.randn(2, 3, PX, PX, generator=draw), masks


class Given(nn.Module):
    """A backbone that has the maps."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(feature_maps=self.maps)


def of_the_library(net: Segmentor, x: Tensor) -> Mask2FormerForUniversalSegmentation:
    """Its whole model, with the layers of our head, on our maps."""
    head = net.head
    assert isinstance(head, Mask2FormerHead)
    maps = net.backbone.forward_intermediates(x, intermediates_only=True)
    maps = [norm(each.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, each in zip(net.norms, maps, strict=True)]
    whole = Mask2FormerForUniversalSegmentation(_config([each.shape[1] for each in maps], 32, CLASSES))
    whole.model.pixel_level_module.encoder = Given(maps)
    whole.model.pixel_level_module.decoder, whole.model.transformer_module = head.pixels, head.queries
    whole.class_predictor = head.classifier
    return whole


def test_loss_is_the_librarys() -> None:
    net, (x, masks) = segmentor(), images()
    torch.manual_seed(1)
    outputs = net(x)
    assert isinstance(outputs, Predictions)
    loss = segmentation_loss(model(), CLASSES)(outputs, masks)
    labels = [torch.tensor([0, 1, 2]), torch.tensor([0, 2])]
    binary = [torch.stack([(mask == label).float() for label in own]) for mask, own in zip(masks, labels, strict=True)]
    whole = of_the_library(net, x).train()
    torch.manual_seed(1)
    theirs = whole(pixel_values=x, mask_labels=binary, class_labels=labels)
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-6, atol=0)


@torch.no_grad()
def test_result_is_the_librarys() -> None:
    net, (x, _) = segmentor().eval(), images()
    logits = net(x)
    assert logits.shape == (2, CLASSES, PX, PX)
    theirs = of_the_library(net, x).eval()(pixel_values=x)
    resized = nn.functional.interpolate(theirs.masks_queries_logits, (PX, PX), mode="bilinear", align_corners=False)
    expected = torch.einsum("bqc,bqhw->bchw", theirs.class_queries_logits.softmax(-1)[..., :-1], resized.sigmoid())
    torch.testing.assert_close(logits.exp(), expected, rtol=1e-4, atol=1e-6)
    processed = Mask2FormerImageProcessor().post_process_semantic_segmentation(theirs, [(PX, PX)] * 2)
    agreed = (torch.stack(processed) == logits.argmax(1)).float().mean()
    assert agreed > 0.9  # it enlarges masks to 384 px before


@pytest.mark.parametrize("labelled", ["all", "one image", "none"])
def test_each_weight_gets_a_gradient_and_the_same_from_the_same_seed(labelled: str) -> None:
    """In the same order whatever is labelled: by it DeepSpeed adds those of all ranks."""
    net, (x, masks) = segmentor(), images()
    order: list[str] = []
    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    segmentation_loss(model(), CLASSES)(net(x), masks).backward()
    expected = order.copy()
    if labelled != "all":
        masks[1 if labelled == "one image" else slice(None)] = IGNORED
    found = []
    for _ in range(2):
        net.zero_grad()
        order.clear()
        torch.manual_seed(1)
        loss = segmentation_loss(model(), CLASSES)(net(x), masks)
        loss.backward()
        assert torch.isfinite(loss)
        assert order == expected
        found.append([loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(found[0]) == 1 + len(list(net.parameters()))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert sorted(net.state_dict()) == sorted(name for name, _ in net.named_parameters())


def test_a_net_without_values_has_shapes() -> None:
    with torch.device("meta"):
        net = Segmentor(model(), CLASSES, PX).eval()
        assert net(torch.empty(1, 3, 96, PX)).shape == (1, CLASSES, 96, PX)


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.auxiliary_weight 0.4 is of the uper heads"):
        model(auxiliary_weight=0.4)
    with pytest.raises(ValueError, match=r"model.head_channels 48 is not a multiple of 32"):
        model(head_channels=48)
    monkeypatch.setitem(sys.modules, "transformers", None)
    missing = r"mask2former needs .* pip install 'hornet-pretraining\[heads\]'"
    with pytest.raises(ConfigError, match=missing):
        segmentor()
    config = load("configs/segment_mask2former_hornet_l_ade20k_640.yaml", [f"output_root={tmp_path}"], SegmentConfig)
    with pytest.raises(ConfigError, match=missing):
        preflight(config, None, 1, resume=False)
