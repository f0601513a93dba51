"""int8 weights: torchao and torch put others into a model, or other modules, and it computes with those."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from pipeline.models.fuse import fuse_for_inference
from pipeline.models.hornet import HorNet
from tests.support.models import drawn_state, furthest, model_of

# Of the norm of the logits, with weights as large as they get. Measured: 0.008 and 0.024.
WEIGHT_ONLY, DYNAMIC = 0.02, 0.04


@pytest.fixture(params=[False, True], ids=["7x7", "gf"])
def model(request: pytest.FixtureRequest) -> HorNet:
    net = model_of(request.param)
    net.load_state_dict(drawn_state(net))
    return net.eval()


def logits_of(model: nn.Module, grad: bool = False) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        logits: torch.Tensor = model(torch.randn(2, 3, 64, 64))
    return logits.detach()


@pytest.mark.parametrize("fused", [False, True])
def test_torchao_weight_only(model: HorNet, fused: bool) -> None:
    before = logits_of(model)
    net = fuse_for_inference(copy.deepcopy(model)) if fused else copy.deepcopy(model)
    quantize_(net, Int8WeightOnlyConfig())
    after = logits_of(net)
    assert 0 < furthest([after], [before]) < WEIGHT_ONLY
    torch.testing.assert_close(logits_of(net, grad=True), after)
    assert torch.equal(logits_of(model), before)  # a copy, and the original as it was


def test_quantize_dynamic(model: HorNet) -> None:
    before = logits_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants torchao to be used
        net = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert 0 < furthest([logits_of(net)], [before]) < DYNAMIC
    torch.testing.assert_close(logits_of(net, grad=True), logits_of(net))
