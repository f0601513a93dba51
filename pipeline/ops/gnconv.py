"""Recursive gated convolution (gnConv) and its global-local filter.

Source: HorNet, Rao et al. 2022, sections 3.1 (gnConv) and 3.3 (global filter variant). `GnConv.forward` is the readable
path; `GnConv.normed` is the same function with less kept for the backward pass. Activations are NHWC throughout, so
that every 1x1 convolution is one matrix product and LayerNorm runs over the last dimension; parameters keep their
published names and shapes.
"""

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.ops import recompute
from pipeline.ops.depthwise import depthwise
from pipeline.ops.fourier import FourierBasis
from pipeline.ops.global_filter import GlobalLocalFilter
from pipeline.ops.layers import Norm, linear, norm_of, scaled


def gnconv_dims(dim: int, order: int) -> list[int]:
    """Channels of each gating step, `dim / 2**(order - 1)` up to `dim`, e.g. (64, 3) -> [16, 32, 64].

    Raises:
        ValueError: `order` is below 1 or the narrowest step would not be a whole number of channels.
    """
    if order < 1 or dim % 2 ** (order - 1):
        raise ValueError(
            f"gnConv of order {order} needs a width that is a multiple of 2**(order - 1), got {dim} channels: "
            "change the width or the order of this stage"
        )
    return [dim // 2**k for k in reversed(range(order))]


def recursive_gating(gate: Tensor, context: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The recursion of gnConv: `x_0 = gate * c_0`, then `x_k = (W_k x_{k-1} + b_k) * c_k`.

    Args:
        gate: (B, H, W, dims[0]).
        context: (B, H, W, sum(dims)), what the depthwise layer saw; `c_0, c_1, ...` are its consecutive slices.
        weights: one per further order, (dims[k], dims[k-1]) or the same as a 1x1 convolution with two
            trailing ones.
        biases: one per further order, (dims[k],).

    Returns:
        (B, H, W, dims[-1]). Source: HorNet, section 3.1, equations 3.3 and 3.4.
    """
    dims = [gate.shape[-1], *(w.shape[0] for w in weights)]
    first, *rest = context.split(dims, dim=-1)
    x = gate * first  # (B, H, W, dims[0])
    for weight, bias, context_k in zip(weights, biases, rest, strict=True):
        x = linear(x, weight, bias) * context_k  # (B, H, W, dims[k])
    return x


class GnConv(nn.Module):
    """Gated convolution of order `order` on (B, H, W, dim) -> (B, H, W, dim).

    Args:
        dim: channels, a multiple of `2**(order - 1)`.
        order: how many gating steps; 1 is an ordinary gated convolution.
        filter_size: None for a 7x7 depthwise convolution, or (h, w) of the stored global filter (see
            `GlobalLocalFilter`).
        scale: factor on the depthwise output, 1/3 in every published model.

    Raises:
        ValueError: `dim` does not divide (see `gnconv_dims`, `GlobalLocalFilter`).

    Source: HorNet, section 3.1.
    """

    def __init__(
        self, dim: int, order: int = 5, filter_size: tuple[int, int] | None = None, scale: float = 1 / 3
    ) -> None:
        super().__init__()
        self.dims = gnconv_dims(dim, order)
        self.scale = scale
        total = sum(self.dims)
        self.proj_in = nn.Conv2d(dim, self.dims[0] + total, 1)
        self.dwconv: nn.Module
        if filter_size is None:
            self.dwconv = nn.Conv2d(total, total, 7, padding=3, groups=total)
        else:
            self.dwconv = GlobalLocalFilter(total, filter_size)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.pws = nn.ModuleList(nn.Conv2d(narrow, wide, 1) for narrow, wide in itertools.pairwise(self.dims))

    def forward(self, x: Tensor, basis: FourierBasis | None = None, layer_scale: Tensor | None = None) -> Tensor:
        """`basis`: see `GlobalLocalFilter.forward`. `layer_scale`: (dim,), a factor that goes into the last weight."""
        x = linear(x, self.proj_in.weight, self.proj_in.bias)  # (B, H, W, dims[0] + total)
        gate, context = x.split([self.dims[0], sum(self.dims)], dim=-1)
        if isinstance(self.dwconv, GlobalLocalFilter):
            context = self.dwconv(context, basis, self.scale)
        else:
            context = depthwise(context, *self._scaled_depthwise())
        pws = self._pws()
        x = recursive_gating(gate, context, [weight for weight, _ in pws], [bias for _, bias in pws])
        return linear(x, *self._proj_out(layer_scale, x.dtype))

    def normed(
        self, x: Tensor, norm: Norm, layer_scale: Tensor | None, rows: Tensor | None, basis: FourierBasis | None
    ) -> tuple[Tensor, Tensor]:
        """(x, `forward` of the LayerNorm of x at the samples `rows`), keeping convolutions and matrix products alone.

        The `x` returned is for the residual, see `recompute.norm_linear`.
        """
        dtype = x.dtype
        layers = [(weight.to(dtype), bias.to(dtype)) for weight, bias in self._proj_in()]
        x, gate, context = recompute.norm_linear(x, norm, *layers, rows=rows)
        post = None
        if not isinstance(self.dwconv, GlobalLocalFilter):
            context = depthwise(context, *self._scaled_depthwise())
        elif basis is None:
            context = self.dwconv(context, None, self.scale)
        else:
            filt, local = self.dwconv.spectrum_filter(context), self.dwconv.dw.weight
            context = recompute.local_global(context, norm_of(self.dwconv.pre_norm), local, filt, basis)
            post = norm_of(self.dwconv.post_norm, self.scale)
        pws = [(weight.flatten(1).to(dtype), bias.to(dtype)) for weight, bias in self._pws()]
        return x, recompute.gating(gate, context, post, pws, self._proj_out(layer_scale, dtype))

    def _proj_in(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of the part that gives the gate (dims[0] channels), and of that of the context (the rest)."""
        dims = [self.dims[0], sum(self.dims)]
        weights, biases = self.proj_in.weight.flatten(1).split(dims), cast(Tensor, self.proj_in.bias).split(dims)
        return list(zip(weights, biases, strict=True))

    def _scaled_depthwise(self) -> tuple[Tensor, Tensor]:
        """`scale` goes into the weights: exact up to rounding, and no pass over the map."""
        conv = cast(nn.Conv2d, self.dwconv)
        weight, bias = conv.weight, cast(Tensor, conv.bias)
        return (weight, bias) if self.scale == 1 else (weight * self.scale, bias * self.scale)

    def _pws(self) -> list[tuple[Tensor, Tensor]]:
        return [(pw.weight, cast(Tensor, pw.bias)) for pw in cast(list[nn.Conv2d], list(self.pws))]

    def _proj_out(self, layer_scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight, bias = self.proj_out.weight.flatten(1), cast(Tensor, self.proj_out.bias)
        if layer_scale is None:
            return weight.to(dtype), bias.to(dtype)
        return scaled(weight, layer_scale, dtype), scaled(bias, layer_scale, dtype)
