"""The HorNet block, and what drop path leaves of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.ops import kernels, recompute
from pipeline.ops.fourier import FourierBasis
from pipeline.ops.gnconv import GnConv
from pipeline.ops.layers import NORM_EPS, is_plain, layer_norm, linear, linear_of, norm_of, scaled

Saving = Literal["none", "selective", "selective_mlp"]


class Keep(NamedTuple):
    """What drop path leaves of one branch of a block in one forward pass.

    rows: samples of the batch that are computed, ascending, or None for all. factor: what they are multiplied by.
    mask: (B, 1, 1, 1), float32 or float64, a factor for each sample where all are computed, 0 for those dropped: the
    spelling for torch.compile, which wants shapes that do not change.
    """

    rows: Tensor | None = None
    factor: float = 1.0
    mask: Tensor | None = None


KEEP_ALL = Keep()


def draw_keeps(rates: Sequence[float], batch: int, like: Tensor, masks: bool) -> list[Keep]:
    """One `Keep` per rate: a sample's branch is dropped with that probability, and scaled by 1 / (1 - rate) where not.

    Drawn from the CPU's generator, so that the host knows how many are left without waiting for a GPU; the same draws
    as timm's DropPath on a CPU. `like`: of the device and dtype of the activations. `masks`: see `Keep.mask`.

    Source: Deep Networks with Stochastic Depth, Huang et al. 2016.
    """
    kept = [torch.empty(batch, device="cpu").bernoulli_(1 - rate).bool() for rate in rates if rate > 0]
    if not kept:
        return [KEEP_ALL] * len(rates)
    if masks:
        factors = torch.stack(kept) / (1 - torch.tensor([rate for rate in rates if rate > 0], device="cpu"))[:, None]
        wide = torch.promote_types(like.dtype, torch.float32)  # 1 / (1 - rate) is no number of bf16
        drawn = [Keep(mask=mask) for mask in _sent(factors.view(-1, batch, 1, 1, 1), like).to(wide)]
    else:
        # A branch that no sample takes is computed for one, and times 0: without a gradient for its parameters,
        # ranks would wait for each other for ever.
        left = [mask.nonzero().flatten() for mask in kept]
        chosen = [rows if len(rows) else torch.zeros(1, dtype=torch.int64, device="cpu") for rows in left]
        on_device = _sent(torch.cat(chosen), like).split([len(rows) for rows in chosen])
        factors_ = [1 / (1 - rate) for rate in rates if rate > 0]
        drawn = [
            Keep(None if len(rows) == batch else sent, factor if len(rows) else 0.0)
            for rows, sent, factor in zip(left, on_device, factors_, strict=True)
        ]
    remaining = iter(drawn)
    return [next(remaining) if rate > 0 else KEEP_ALL for rate in rates]


class Block(nn.Module):
    """gnConv, then a two-layer MLP, each behind a LayerNorm, a layer scale and a residual.

    (B, H, W, dim) -> (B, H, W, dim). Source: HorNet, section 3.3.
    """

    def __init__(
        self, dim: int, order: int, filter_size: tuple[int, int] | None, drop_path: float, layer_scale_init: float
    ) -> None:
        super().__init__()
        self.layer_scale_init = layer_scale_init
        self.drop_path_rate = drop_path
        self.gamma1: nn.Parameter | None = nn.Parameter(torch.full((dim,), layer_scale_init))
        self.gamma2: nn.Parameter | None = nn.Parameter(torch.full((dim,), layer_scale_init))
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.gnconv = GnConv(dim, order, filter_size)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(
        self,
        x: Tensor,
        keep: tuple[Keep, Keep] = (KEEP_ALL, KEEP_ALL),
        basis: FourierBasis | None = None,
        saving: Saving = "none",
    ) -> Tensor:
        """`basis`: see `GnConv.forward`. `saving`: what is kept for the backward pass, see `HorNet.set_checkpointing`.

        A sample that drop path drops is not computed: what is left is gathered, and added where it belongs.
        """
        x, f = self._gnconv(x, keep[0], basis, saving)
        x = _add(x, f, keep[0])
        x, f = self._mlp(x, keep[1], saving)
        return _add(x, f, keep[1])

    def _gnconv(self, x: Tensor, keep: Keep, basis: FourierBasis | None, saving: Saving) -> tuple[Tensor, Tensor]:
        norm = norm_of(self.norm1)
        if _infers():
            f = self.gnconv(layer_norm(recompute.take_rows(x, keep.rows), norm), basis)
            return x, f if self.gamma1 is None else f * (self.gamma1 * keep.factor).to(f.dtype)
        # In training the scale goes into the weight, and not over the map.
        scale = None if self.gamma1 is None else self.gamma1 * keep.factor
        if saving == "none":
            return x, self.gnconv(layer_norm(recompute.take_rows(x, keep.rows), norm), basis, scale)
        return self.gnconv.normed(x, norm, scale, keep.rows, basis)

    def _mlp(self, x: Tensor, keep: Keep, saving: Saving) -> tuple[Tensor, Tensor]:
        norm, dtype = norm_of(self.norm2), x.dtype
        if _infers() or not is_plain(self.pwconv1):
            h = linear_of(self.pwconv1, layer_norm(recompute.take_rows(x, keep.rows), norm))
            f = linear_of(self.pwconv2, F.gelu(h))
            return x, f if self.gamma2 is None else f * (self.gamma2 * keep.factor).to(dtype)
        first = (self.pwconv1.weight.to(dtype), self.pwconv1.bias.to(dtype))
        weight: Tensor = self.pwconv2.weight
        bias: Tensor = self.pwconv2.bias
        if self.gamma2 is None:
            second = (weight.to(dtype), bias.to(dtype))
        else:
            scale = self.gamma2 * keep.factor
            second = (scaled(weight, scale, dtype), scaled(bias, scale, dtype))
        if saving == "none":
            h = linear(layer_norm(recompute.take_rows(x, keep.rows), norm), *first)  # (B, H, W, 4 dim)
            return x, linear(F.gelu(h), *second)
        if saving == "selective_mlp":
            return recompute.norm_mlp(x, norm, first, second, keep.rows)
        x, h = recompute.norm_linear(x, norm, first, rows=keep.rows)
        return x, recompute.gelu_linear(h, *second)


def _infers() -> bool:
    """Exports too, whether gradients are on or not: the one graph."""
    return not torch.is_grad_enabled() or kernels.exported()


def _add(x: Tensor, f: Tensor, keep: Keep) -> Tensor:
    if keep.mask is not None:
        return x + (f * keep.mask).to(x.dtype)
    return x + f if keep.rows is None and not kernels.usable(x) else recompute.add_rows(x, f, keep.rows)


def _sent(tensor: Tensor, like: Tensor) -> Tensor:
    """On the device of `like`, without waiting for it."""
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor.to(like.device)
