"""The Triton kernels against the plain spellings on small inputs, on the GPU they are about to run on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.ops import kernels, recompute
from pipeline.ops.depthwise import depthwise
from pipeline.ops.layers import Norm
from pipeline.ops.recompute_gating import gating

# Of the norm, against float64: TF32 and bf16 products round to 5e-4 and 4e-3, a wrong index is off by about 1.
_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 4e-2}
_BATCH, _SIDE, _DIM, _WIDE = 3, 9, 96, 1536


def disagreement(device: torch.device) -> str | None:
    """Runs every operator with kernels, and plainly in float64: which one differs in value or gradient, or None."""
    for name, operator, shapes in _cases(device):
        with kernels.forced(False):
            truth = _with_gradients(operator, shapes, torch.float64, device)
        for dtype, tolerance in _TOLERANCE.items():
            with kernels.forced(True):
                found = _with_gradients(operator, shapes, dtype, device)
            for plain, fast in zip(truth, found, strict=True):
                error = float((fast - plain).norm() / plain.norm())
                if not error <= tolerance:
                    return f"{name} in {dtype} is off by {error:.1e}"
    return None


Case = tuple[str, Callable[..., Tensor], list[tuple[int, ...]]]


def _cases(device: torch.device) -> list[Case]:
    """(name, operator, shapes of its inputs). Maps are (B, H, W, C)."""
    d, rows = _DIM, torch.tensor([0, 2], device=device)
    positions = (_BATCH, _SIDE, _SIDE)

    def normed(x: Tensor, weight: Tensor, bias: Tensor, *affine: Tensor, rows: Tensor | None) -> Tensor:
        norm = Norm(affine[0] if affine else None, affine[1] if affine else None, 1e-6)
        x, y = recompute.norm_linear(x, norm, (weight, bias), rows=rows)
        return recompute.add_rows(x, y, rows)

    def gated(gate: Tensor, context: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return gating(gate, context, None, [(w1, b1)], (w2, b2))

    def square(width: int) -> list[tuple[int, ...]]:
        return [(width, width), (width,)]

    affine = [(d,), (d,)]
    wide = [(2, 2, 2, _WIDE), *square(_WIDE), (_WIDE,), (_WIDE,)]
    return [
        ("depthwise 7x7", depthwise, [(*positions, d), (d, 1, 7, 7), (d,)]),
        ("depthwise 3x3", lambda x, w: depthwise(x[..., :d], w, None), [(*positions, 2 * d), (d, 1, 3, 3)]),
        ("LayerNorm", partial(normed, rows=None), [(*positions, d), *square(d), *affine]),
        ("LayerNorm without scale and bias", partial(normed, rows=None), [(*positions, d), *square(d)]),
        ("LayerNorm of many channels", partial(normed, rows=None), wide),
        ("LayerNorm and residual of some samples", partial(normed, rows=rows), [(*positions, d), *square(d), *affine]),
        ("gating", gated, [(*positions, d), (*positions, 3 * d), (2 * d, d), (2 * d,), (d, 2 * d), (d,)]),
        ("GELU", recompute.gelu_linear, [(*positions, d), *square(d)]),
    ]


def _with_gradients(
    operator: Callable[..., Tensor], shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """The value and the gradients, float64, of inputs that every dtype represents alike."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").bfloat16().to(device, dtype)

    drawn = [draw(shape).requires_grad_() for shape in shapes]
    out = operator(*drawn)
    gradients = torch.autograd.grad(out, drawn, draw(tuple(out.shape)))
    return [each.detach().double() for each in (out, *gradients)]
