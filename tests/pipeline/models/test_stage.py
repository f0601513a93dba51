"""Stages of blocks that are not as the net made them, and which weights a pass goes by."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.models.hornet import HorNet
from pipeline.models.stage import POLICIES
from tests.support.models import furthest, gradients, model_of

pytestmark = pytest.mark.usefixtures("one_thread")

STAGE = 2  # of two blocks


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Skipped(nn.Module):
    """What may stand where a block was."""

    drop_path_rate = 0.0

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


@pytest.mark.parametrize("gf", [False, True], ids=["7x7", "gf"])
def test_weights_may_come_with_the_block(gf: bool) -> None:
    """As FSDP and ZeRO stage 3 have it: by a hook before each block, and gone behind it."""
    model, whole = (model_of(gf, drop_path_rate=0.0) for _ in range(2))
    stored = {name: parameter.data.clone() for name, parameter in model.named_parameters()}

    def bring(name: str, there: bool) -> Any:
        def hook(block: nn.Module, *_: Any) -> None:
            for inner, parameter in block.named_parameters():
                kept = stored[f"{name}.{inner}"]
                parameter.data = kept if there else torch.zeros_like(kept)

        return hook

    for name, block in model.stages.named_modules(prefix="stages"):
        if name.count(".") == 2:
            block.register_forward_pre_hook(bring(name, there=True))
            block.register_forward_hook(bring(name, there=False))
            bring(name, there=False)(block)
    assert torch.equal(model(images()), whole(images()))


def test_blocks_may_differ() -> None:
    """As pruning leaves them: a narrower MLP, and none at all."""
    for policy in POLICIES:
        model = model_of(True)
        block, (_, other) = model.stages[STAGE][0], model.stages[STAGE].children()
        width = block.pwconv1.in_features
        block.pwconv1, block.pwconv2 = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        logits, *found = gradients(model, images(), policy)
        with torch.no_grad():
            torch.manual_seed(1)
            torch.testing.assert_close(model(images()), logits)
        assert all(gradient.isfinite().all() for gradient in found)
        model.stages[STAGE][0] = Skipped()
        gradients(model, images(), policy)
        assert other.gamma1.grad.any()


@pytest.mark.parametrize("gf", [False, True], ids=["7x7", "gf"])
def test_what_is_recomputed_goes_by_the_weights_that_were_given(gf: bool) -> None:
    """The backward pass is outside of `functional_call`, as it is of the capture of a graph."""
    model = model_of(gf, torch.float64, drop_path_rate=0.0)
    given = {name: (1.3 * weight.detach()).requires_grad_() for name, weight in model.named_parameters()}
    x = images().double().requires_grad_()

    def found(net: HorNet, weights: dict[str, Tensor]) -> list[Tensor]:
        loss = functional_call(net, weights, (x,)).square().sum()
        return list(torch.autograd.grad(loss, [x, *weights.values()]))

    plain = found(model, given)
    for policy in POLICIES[1:]:
        model.set_checkpointing(policy)
        assert furthest(found(model, given), plain) <= 1e-9, policy
