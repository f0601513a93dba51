"""The Triton kernels against the plain spellings on small inputs, on the GPU they are about to run on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.ops import kernels, recompute
from pipeline.ops.depthwise import depthwise
from pipeline.ops.layers import Norm

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # of the norm: rounding differs, a wrong index is near 1
_BATCH, _SIDE, _DIM = 3, 9, 48


def disagreement(device: torch.device) -> str | None:
    """Runs every operator with kernels and without: which one differs in value or gradient, or None."""
    for dtype, tolerance in _TOLERANCE.items():
        for name, operator, widths in _cases(device):
            results = []
            for on in (False, True):
                with kernels.forced(on):
                    results.append(_with_gradients(operator, widths, dtype, device))
            for plain, fast in zip(*results, strict=True):
                error = float((fast - plain).norm() / plain.norm())
                if not error <= tolerance:
                    return f"{name} in {dtype} is off by {error:.1e}"
    return None


def _cases(device: torch.device) -> list[tuple[str, Callable[..., Tensor], list[tuple[int, ...]]]]:
    """(name, operator, shapes of its inputs). Maps are (B, H, W, C)."""
    d, rows = _DIM, torch.tensor([0, 2], device=device)
    whole, kept = (_BATCH, _SIDE, _SIDE, d), (2, _SIDE, _SIDE, d)

    def normed(x: Tensor, w: Tensor, b: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None) -> Tensor:
        x, y = recompute.norm_linear(x, Norm(w, b, 1e-6), (weight, bias), rows=rows)
        return recompute.add_rows(x, y, rows)

    def gated(gate: Tensor, context: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return recompute.gating(gate, context, None, [(w1, b1)], (w2, b2))

    affine, square = [(d,), (d,)], [(d, d), (d,)]
    return [
        ("depthwise 7x7", depthwise, [whole, (d, 1, 7, 7), (d,)]),
        ("depthwise 3x3", lambda x, w: depthwise(x[..., :d], w, None), [(*whole[:3], 2 * d), (d, 1, 3, 3)]),
        ("LayerNorm", partial(normed, rows=None), [whole, *affine, *square]),
        ("LayerNorm and residual of some samples", partial(normed, rows=rows), [whole, *affine, *square]),
        ("gating", gated, [(*kept[:3], d), (*kept[:3], 3 * d), (2 * d, d), (2 * d,), (d, 2 * d), (d,)]),
        ("GELU", recompute.gelu_linear, [kept, *square]),
    ]


def _with_gradients(
    operator: Callable[..., Tensor], shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():  # it may be the first pass of an evaluation that asks
        return _in_grad_mode(operator, shapes, dtype, device, generator)


def _in_grad_mode(
    operator: Callable[..., Tensor],
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> list[Tensor]:
    drawn = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    out = operator(*drawn)
    probe = torch.randn(out.shape, generator=generator).to(device, dtype)
    return [each.detach().float() for each in (out, *torch.autograd.grad(out, drawn, probe))]
