"""What is traced on fake tensors is what a real pass on real ones keeps; and on a GPU autocast would keep the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.config.dense import SegmentConfig
from pipeline.config.load import Config, load
from pipeline.dense.segmentor import Segmentor, segmentation_loss
from pipeline.models.build import build_model
from pipeline.ops import kernels
from pipeline.planning.subject import subject_of
from pipeline.planning.trace import Kept, at_batch, autocast, fake_net
from pipeline.training.recipe import mixing_and_loss
from tests.pipeline.planning.conftest import traced_once
from tests.support.runs import ROOT

CLASSES, SIDE, BATCH = 50, 32, 8


def configured(policy: str) -> Config:
    return load(ROOT / "configs" / "demo_pretrain.yaml", [f"model.checkpointing={policy}", f"data.resolution={SIDE}"])


def segmenting(policy: str) -> SegmentConfig:
    changes = ["model.head_channels=8", f"model.checkpointing={policy}", f"data.resolution={SIDE}"]
    return load(ROOT / "configs" / "demo_segment.yaml", [*changes, "evaluate.stride_px=16"], SegmentConfig)


def really_kept(policy: str, bf16: bool) -> int:
    """Bytes that autograd keeps in a real forward pass on the CPU."""
    config = configured(policy)
    targets = torch.full((BATCH, CLASSES), 1 / CLASSES)
    return kept_by(build_model(config.model, CLASSES, SIDE), mixing_and_loss(config.augment, CLASSES)[1], targets, bf16)


def kept_by(
    net: nn.Module, loss: Callable[[Any, torch.Tensor], torch.Tensor], targets: torch.Tensor, bf16: bool
) -> int:
    images = torch.randn(BATCH, 3, SIDE, SIDE)
    net.train()
    kept = Kept({t.untyped_storage()._cdata for t in (images, targets, *net.parameters(), *net.buffers())})
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = net(images)
        loss(outputs, targets)
    return kept.bytes


@pytest.mark.parametrize(
    ("policy", "bf16"),
    [("none", False), ("selective", True), ("selective_mlp", True), ("block", True), ("stage", True)],
)
def test_kept_as_in_a_real_pass(policy: str, bf16: bool) -> None:
    traced = traced_once(configured(policy), CLASSES, policy, BATCH, bf16)
    assert traced.saved == pytest.approx(really_kept(policy, bf16), rel=0.02)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_segmentation_keeps_as_in_a_real_pass(bf16: bool) -> None:
    config = segmenting("selective")
    net, loss = Segmentor(config.model, CLASSES, SIDE), segmentation_loss(config.model, CLASSES)
    masks = torch.randint(0, CLASSES, (BATCH, SIDE, SIDE))
    traced = traced_once(config, CLASSES, "selective", BATCH, bf16)
    assert traced.saved == pytest.approx(kept_by(net, loss, masks, bf16), rel=0.02)
    assert {m.name: m.elements for m in traced.backward} == {n: p.numel() for n, p in net.named_parameters()}


def test_autocast_of_a_gpu_keeps_the_same() -> None:
    kept = {}
    with kernels.enabled(False), FakeTensorMode():
        for device in ("cpu", "cuda"):
            net = fake_net(subject_of(configured("selective"), CLASSES), "selective", device)
            images = torch.empty(BATCH, 3, SIDE, SIDE, device=device)
            found = Kept({t.untyped_storage()._cdata for t in (images, *net.parameters(), *net.buffers())})
            with torch.autograd.graph.saved_tensors_hooks(found.pack, lambda t: t), autocast(device, True):
                net(images)
            kept[device] = found.bytes
    assert kept["cpu"] == pytest.approx(kept["cuda"], rel=0.01)


def test_another_batch_is_on_the_line() -> None:
    config = configured("selective")
    four, eight, sixteen = (traced_once(config, CLASSES, "selective", batch, True) for batch in (4, 8, 16))
    guessed = at_batch(eight, sixteen, 4)
    assert guessed.saved == pytest.approx(four.saved, rel=0.001)
    assert guessed.dense_flops == pytest.approx(four.dense_flops, rel=0.001)
    assert [m.peak for m in guessed.backward] == pytest.approx([m.peak for m in four.backward], rel=0.02)


def test_all_gradients_come_once() -> None:
    config = configured("block")
    traced = traced_once(config, CLASSES, "block", BATCH, True)
    net = build_model(config.model, CLASSES, SIDE)
    assert {m.name: m.elements for m in traced.backward} == {n: p.numel() for n, p in net.named_parameters()}
    assert traced.backward[-1].after < 0.01 * traced.saved  # all that was kept has gone
