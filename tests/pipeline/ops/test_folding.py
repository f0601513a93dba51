"""Layers folded all at once are layers folded one by one in float32, whatever their dtypes, frozen or not."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.ops.folding import Layer, cast_layers, fold_norms, fold_rows

BF16, F32, OUT, IN = torch.bfloat16, torch.float32, 6, 4
FACTORS = (1.0, 1.25, 2.0)


def parameters(dtypes: Sequence[torch.dtype], *shapes: tuple[int, ...]) -> list[list[Tensor]]:
    """For each layer, tensors of `shapes` in its dtype."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes] for dtype in dtypes
    ]


def folded(kind: str, found: list[list[Tensor]], factors: Sequence[float]) -> list[Layer]:
    layers = [(each[0], each[1]) for each in found]
    if kind == "rows":
        return fold_rows(layers, [each[2] for each in found], factors, BF16)
    return (
        fold_norms(layers, [(each[2], each[3]) for each in found], BF16)
        if kind == "norms"
        else cast_layers(layers, BF16)
    )


@pytest.mark.parametrize("frozen", [None, 0, 1], ids=["none frozen", "a weight", "its bias"])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, F32), (F32, BF16, BF16)], ids=str)
@pytest.mark.parametrize("kind", ["rows", "norms", "cast"])
def test_all_at_once_is_one_by_one(kind: str, dtypes: Sequence[torch.dtype], frozen: int | None) -> None:
    shapes = {"rows": ((OUT,),), "norms": ((IN,), (IN,)), "cast": ()}[kind]
    at_once = parameters(dtypes, (OUT, IN), (OUT,), *shapes)
    by_one = [[part.detach().float().requires_grad_() for part in each] for each in at_once]
    if frozen is not None:
        at_once[1][frozen].requires_grad_(False)
        by_one[1][frozen].requires_grad_(False)
    ours = folded(kind, at_once, FACTORS)
    theirs = [layer for each, factor in zip(by_one, FACTORS, strict=True) for layer in folded(kind, [each], [factor])]
    generator = torch.Generator().manual_seed(1)
    for layer, other in zip(ours, theirs, strict=True):
        for part, alone in zip(layer, other, strict=True):
            assert torch.equal(part, alone)
            assert part.dtype == BF16
            if alone.requires_grad:
                alone.backward(torch.randn(alone.shape, generator=generator).bfloat16(), retain_graph=True)
    generator = torch.Generator().manual_seed(1)
    sum(
        (part * torch.randn(part.shape, generator=generator).bfloat16()).float().sum()
        for layer in ours
        for part in layer
        if part.requires_grad
    ).backward()
    for each, other in zip(at_once, by_one, strict=True):
        for parameter, alone in zip(each, other, strict=True):
            assert (parameter.grad is None) == (alone.grad is None) == (not parameter.requires_grad)
            if parameter.grad is not None:
                assert parameter.grad.dtype == parameter.dtype
                torch.testing.assert_close(parameter.grad, alone.grad.to(parameter.dtype))
