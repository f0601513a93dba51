"""Recursive gated convolution (gnConv) and its global-local filter.

Source: HorNet, Rao et al. 2022, sections 3.1 (gnConv) and 3.3 (global filter variant). `GnConv.forward` is the readable
path; `GnConv.normed` and `GnConv.lean` are the same function with less kept for the backward pass. Activations are NHWC
throughout, so that every 1x1 convolution is one matrix product and LayerNorm runs over the last dimension; parameters
keep their published names and shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import Tensor, nn

from pipeline.ops import kernels, recompute
from pipeline.ops.depthwise import Taps, depthwise, kernel_taps
from pipeline.ops.folding import Layer, cast_layers, copies, fold_into, fold_rows, times
from pipeline.ops.fourier import FourierBasis, SpectrumFilter
from pipeline.ops.global_filter import GlobalLocalFilter, filters_of
from pipeline.ops.layers import Norm, linear, norm_of
from pipeline.ops.recompute_filter import local_global
from pipeline.ops.recompute_gating import gating


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
        in_dim: channels of the input where they are not `dim`: (B, H, W, in_dim) -> (B, H, W, dim).
        order: how many gating steps; 1 is an ordinary gated convolution.
        filter_size: None for a 7x7 depthwise convolution, or (h, w) of the stored global filter (see
            `GlobalLocalFilter`).
        scale: factor on the depthwise output, 1/3 in every published model.

    Raises:
        ValueError: `dim` does not divide (see `gnconv_dims`, `GlobalLocalFilter`).

    Source: HorNet, section 3.1.
    """

    def __init__(
        self,
        dim: int,
        order: int = 5,
        filter_size: tuple[int, int] | None = None,
        scale: float = 1 / 3,
        in_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.dims = gnconv_dims(dim, order)
        self.scale = scale
        total = sum(self.dims)
        self.proj_in = nn.Conv2d(in_dim or dim, self.dims[0] + total, 1)
        self.dwconv: nn.Module
        if filter_size is None:
            self.dwconv = nn.Conv2d(total, total, 7, padding=3, groups=total)
        else:
            self.dwconv = GlobalLocalFilter(total, filter_size)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.pws = nn.ModuleList(nn.Conv2d(narrow, wide, 1) for narrow, wide in itertools.pairwise(self.dims))

    def forward(self, x: Tensor, basis: FourierBasis | None = None) -> Tensor:
        """`basis`: see `GlobalLocalFilter.forward`."""
        gate, context = self._gate_and_context(x, basis)
        pws = [_layer(pw) for pw in self.pws]
        x = recursive_gating(gate, context, [weight for weight, _ in pws], [bias for _, bias in pws])
        return linear(x, *_layer(self.proj_out))

    def lean(self, x: Tensor, basis: FourierBasis | None = None) -> Tensor:
        """`forward`, which keeps convolutions and matrix products alone for the backward pass: without a norm before
        it, as in a decoder.
        """
        gate, context = self._gate_and_context(x, basis)
        *pws, out = cast_layers([_layer(layer) for layer in (*self.pws, self.proj_out)], x.dtype)
        return gating(gate, context, None, pws, out)

    def _gate_and_context(self, x: Tensor, basis: FourierBasis | None) -> tuple[Tensor, Tensor]:
        """(B, H, W, dims[0]) and, out of the depthwise layer and scaled, (B, H, W, sum(dims))."""
        x = linear(x, self.proj_in.weight, self.proj_in.bias)  # (B, H, W, dims[0] + total)
        gate, context = x.split([self.dims[0], sum(self.dims)], dim=-1)
        if isinstance(self.dwconv, GlobalLocalFilter):
            return gate, self.dwconv(context, basis, self.scale)
        conv = cast(nn.Conv2d, self.dwconv)
        weight, bias = conv.weight, cast(Tensor, conv.bias)
        # Into the weights: exact up to rounding, and no pass over the map.
        scaled = (weight, bias) if self.scale == 1 else (weight * self.scale, bias * self.scale)
        return gate, depthwise(context, *scaled)

    def normed(
        self,
        x: Tensor,
        norm: Norm,
        weights: GnConvWeights,
        rows: Tensor | None = None,
        position: Tensor | None = None,
        basis: FourierBasis | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(x, `forward` of the LayerNorm of x at the samples `rows`), by `weights` of `weights_of`.

        Keeps convolutions and matrix products alone for the backward pass, or with `keep` what is between them too.
        The `x` returned is for the residual, see `recompute.norm_linear`.
        """
        parts = (self.dims[0], sum(self.dims))
        x, gate, context = recompute.norm_linear(x, norm, weights.proj_in, parts, rows, position, keep)
        taps, filters, pre, post = weights.context
        if filters is not None and pre is not None and basis is not None and taps is not None:
            context = local_global(context, pre, taps, *filters, basis, keep)
        elif taps is not None:
            context = depthwise(context, taps.weight, taps.bias, (taps.narrow_weight, taps.narrow_bias))
        else:
            context = self.dwconv(context, None, self.scale)
        return x, gating(gate, context, post, weights.pws, weights.proj_out, keep)


class Filters(NamedTuple):
    """Of the global half, for gradients, and the same values in the dtype of the maps."""

    wide: SpectrumFilter
    narrow: SpectrumFilter


class ContextWeights(NamedTuple):
    """Of the depthwise layer: taps; with global filters taken by products those, the first norm, and the last, times
    `scale`.
    """

    taps: Taps | None = None
    filters: Filters | None = None
    pre: Norm | None = None
    post: Norm | None = None


class GnConvWeights(NamedTuple):
    """What `GnConv.normed` multiplies by; the layers in the dtype of the maps."""

    proj_in: Layer
    context: ContextWeights
    pws: list[Layer]
    proj_out: Layer


def weights_of(
    modules: Sequence[GnConv],
    norms: Sequence[Norm],
    scales: Sequence[Tensor] | None,
    factors: Sequence[float],
    x: Tensor,
    size: tuple[int, int] | None,
) -> tuple[list[Norm], list[GnConvWeights]]:
    """(the norms in front, weights) of modules of one shape, for maps like `x`: cast, and scales folded in, at once.

    scales: of each module's output, (dim,); None: there are none. factors: the same for all channels. size: (H, W) of
    the maps where a global filter is taken by products (see `GlobalLocalFilter.forward`).
    """
    norms, proj_in = fold_into(norms, [_layer(module.proj_in) for module in modules], x)
    pws = [layer for module in modules for layer in map(_layer, module.pws)]
    proj_out = [_layer(module.proj_out) for module in modules]
    if scales is None:
        layers = cast_layers([*pws, *proj_out], x.dtype)
        pws, proj_out = layers[: len(pws)], layers[len(pws) :]
    else:
        pws, proj_out = cast_layers(pws, x.dtype), fold_rows(proj_out, scales, factors, x.dtype)
    steps = len(modules[0].pws)
    each_pws = [pws[i * steps : (i + 1) * steps] for i in range(len(modules))]
    each = zip(proj_in, _contexts(modules, x, size), each_pws, proj_out, strict=True)
    return norms, [GnConvWeights(*parts) for parts in each]


def _contexts(modules: Sequence[GnConv], x: Tensor, size: tuple[int, int] | None) -> list[ContextWeights]:
    layers, scale = [module.dwconv for module in modules], modules[0].scale
    # The kernels read parameters as they are.
    exact, count = kernels.usable(x), len(modules)
    if not isinstance(layers[0], GlobalLocalFilter):
        wide = times([part for conv in layers for part in _taps(conv)], scale)
        narrow = copies(wide, wide[0].dtype if exact else x.dtype)
        narrow[::2] = kernel_taps(narrow[::2]) if exact else narrow[::2]
        return [ContextWeights(Taps(*wide[i : i + 2], *narrow[i : i + 2])) for i in range(0, 2 * count, 2)]
    if size is None:
        return [ContextWeights()] * count
    filters = filters_of(cast(list[GlobalLocalFilter], layers), size)
    local: list[Tensor] = [cast(GlobalLocalFilter, layer).dw.weight for layer in layers]
    narrow = copies([*local, *(part for each in filters for part in each)], x.dtype)
    near, far = kernel_taps(local) if exact else narrow[:count], narrow[count:]
    norms = [norm_of(cast(GlobalLocalFilter, layer).post_norm) for layer in layers]
    affine = times([part for norm in norms for part in norm[:2] if part is not None], scale)
    return [
        ContextWeights(
            Taps(local[i], None, near[i], None),
            Filters(filters[i], SpectrumFilter(*far[2 * i : 2 * i + 2])),
            norm_of(cast(GlobalLocalFilter, layers[i]).pre_norm),
            Norm(affine[2 * i], affine[2 * i + 1], norms[i].eps),
        )
        for i in range(count)
    ]


def _taps(conv: nn.Module) -> Layer:
    return cast(Tensor, conv.weight), cast(Tensor, conv.bias)


def _layer(module: nn.Module) -> Layer:
    return cast(Tensor, module.weight).flatten(1), cast(Tensor, module.bias)
