"""Models to compare: the published numbers' weights, and small ones with what hides in large ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import timm
import torch
from torch import Tensor

from pipeline.models.hornet import HorNet
from tests.support.runs import ROOT

GOLDEN = ROOT / "tests" / "golden"


def drawn_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights that tests/golden/README.md describes."""
    rng = np.random.default_rng(20220728)
    state = {}
    for key, old in sorted(model.state_dict().items()):
        n = rng.standard_normal(tuple(old.shape))
        if key.endswith("complex_weight"):
            n = 0.5 * n
        elif old.ndim == 1:
            n = 1 + 0.1 * n if key.endswith("weight") else (0.5 if "gamma" in key else 0.1) * n
        else:
            n = n / np.sqrt(np.prod(old.shape[1:]))
        state[key] = torch.from_numpy(n.astype(np.float32)).to(old.dtype)
    return state


def model_of(gf: bool, dtype: torch.dtype = torch.float32, **options) -> HorNet:
    """All four orders, both kinds of context, odd widths; layer scale does not hide the blocks."""
    torch.manual_seed(0)
    name = "hornet_nano_gf" if gf else "hornet_tiny_7x7"
    options = {"num_classes": 7, "layer_scale_init": 0.5, "drop_path_rate": 0.5, "depths": (1, 2, 2, 1), **options}
    return timm.create_model(name, dims=(12, 24, 48, 96), **options).to(dtype).train()


def gradients(model: HorNet, x: Tensor, policy: str | Sequence[str], autocast: bool = False) -> list[Tensor]:
    """Logits, and the gradients of the input and of every parameter."""
    model.set_checkpointing(policy)
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(x)
    (logits.float() if autocast else logits).square().sum().backward()
    assert x.grad is not None
    return [logits.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def furthest(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest error of a tensor, relative to its norm."""
    pairs = zip(actual, expected, strict=True)
    return max(float((a.double() - e.double()).norm() / e.double().norm()) for a, e in pairs)
