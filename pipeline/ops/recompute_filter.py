"""The global-local filter of a normalised map as one autograd Function: see `recompute.py`, whose words hold.

It keeps the context before the norm, and the spectrum; the norm is done again.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops import primitives
from pipeline.ops.depthwise import Taps, depthwise_backward, depthwise_forward
from pipeline.ops.fourier import FourierBasis, SpectrumFilter, filter_backward, filter_forward
from pipeline.ops.layers import Norm, interleave


def local_global(
    context: Tensor,
    norm: Norm,
    local: Taps,
    filt: SpectrumFilter,
    narrow_filter: SpectrumFilter,
    basis: FourierBasis,
    keep: bool = False,
) -> Tensor:
    """The global-local filter up to its last norm: (B, H, W, C) -> (B, H, W, C), the halves interleaved.

    local: of a 3x3 without bias, C / 2 channels. narrow_filter: the values of `filt` in the dtype of `context`.
    """
    asked = (local.weight, *filt)
    return _LocalGlobal.apply(context, *norm, keep, *asked, local.narrow_weight, *narrow_filter, *basis)


class _LocalGlobal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        context: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        keep: bool,
        _local: Tensor,
        _real: Tensor,
        _imaginary: Tensor,
        local: Tensor,
        real: Tensor,
        imaginary: Tensor,
        *basis: Tensor,
    ) -> Tensor:
        u, mean, rstd = primitives.layer_norm(context, weight, bias, eps)
        near, far = u.chunk(2, -1)
        near = depthwise_forward(near, local, None)
        far, spectrum = filter_forward(far, SpectrumFilter(real, imaginary), FourierBasis(*basis))
        ctx.eps = eps
        kept = u if keep else None
        ctx.save_for_backward(context, mean, rstd, weight, bias, local, real, imaginary, spectrum, kept, *basis)
        return interleave(near, far)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        context, mean, rstd, weight, bias, local, real, imaginary, spectrum, u, *basis = ctx.saved_tensors
        if u is None:
            u = primitives.layer_norm_apply(context, mean, rstd, weight, bias, ctx.eps)
        dnear, dfar = dout.unflatten(-1, (-1, 2)).movedim(-1, 0).contiguous()
        wanted = (True, ctx.needs_input_grad[5], False)
        near, dlocal, _ = depthwise_backward(dnear, u.chunk(2, -1)[0], local, wanted)
        far, dfilter = filter_backward(dfar, spectrum, SpectrumFilter(real, imaginary), FourierBasis(*basis))
        du = primitives.widened_pair(cast(Tensor, near), far)
        dcontext, dweight, dbias = primitives.layer_norm_backward(du, context, mean, rstd, weight, bias, None)
        return dcontext, dweight, dbias, None, None, dlocal, *dfilter, *(None for _ in range(3 + len(basis)))
