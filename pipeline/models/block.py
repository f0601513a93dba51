"""The HorNet block, and what drop path leaves of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.ops import gnconv, kernels, recompute
from pipeline.ops.folding import Layer, cast_layers, fold_into, fold_rows
from pipeline.ops.fourier import FourierBasis
from pipeline.ops.gnconv import GnConv, GnConvWeights
from pipeline.ops.layers import NORM_EPS, Norm, is_plain, layer_norm, linear_of, norm_of
from pipeline.ops.products import sum_dtype

Saving = Literal["none", "selective", "selective_mlp"]


class Keep(NamedTuple):
    """What drop path leaves of one branch of a block in one forward pass.

    rows: samples of the batch that are computed, ascending, or None for all. factor: what they are multiplied by.
    position: (B,), where in `rows` each sample is, or -1; where the kernels want to know.
    mask: (B, 1, 1, 1), float32 or float64, a factor for each sample where all are computed, 0 for those dropped: the
    spelling for torch.compile, which wants shapes that do not change.
    """

    rows: Tensor | None = None
    factor: float = 1.0
    mask: Tensor | None = None
    position: Tensor | None = None


KEEP_ALL = Keep()


def draw_keeps(rates: Sequence[float], batch: int, like: Tensor, masks: bool) -> list[Keep]:
    """One `Keep` per rate: a sample's branch is dropped with that probability, and scaled by 1 / (1 - rate) where not.

    Drawn from the CPU's generator, so that the host knows how many are left without waiting for a GPU; the same draws
    as timm's DropPath on a CPU. `like`: of the device and dtype of the activations. `masks`: see `Keep.mask`.

    Source: Deep Networks with Stochastic Depth, Huang et al. 2016.
    """
    drawn_ = [torch.empty(batch, device="cpu").bernoulli_(1 - rate) for rate in rates if rate > 0]
    if not drawn_:
        return [KEEP_ALL] * len(rates)
    kept = torch.stack(drawn_).bool()  # (draws, B)
    if masks:
        factors = kept / (1 - torch.tensor([rate for rate in rates if rate > 0], device="cpu"))[:, None]
        wide = sum_dtype(like.dtype)  # 1 / (1 - rate) is no number of bf16
        drawn = [Keep(mask=mask) for mask in _sent(factors.view(-1, batch, 1, 1, 1), like).to(wide)]
    else:
        # A branch that no sample takes is computed for one, and times 0: without a gradient for its parameters,
        # ranks would wait for each other for ever.
        chosen, counts = kept.clone(), kept.sum(1)
        chosen[:, 0] |= counts == 0
        sizes, rows = chosen.sum(1).tolist(), chosen.nonzero()[:, 1]
        taken = counts.tolist()
        positions: Sequence[Tensor | None] = [None] * len(kept)
        if kernels.usable(like):
            places = (chosen.cumsum(1) * chosen - 1).flatten()
            rows, places = _sent(torch.cat((rows, places)), like).split([len(rows), len(places)])
            positions = places.view(-1, batch).unbind()
        else:
            rows = _sent(rows, like)
        factors_ = [1 / (1 - rate) for rate in rates if rate > 0]
        drawn = [
            KEEP_ALL._replace(factor=factor)
            if count == batch
            else Keep(sent, factor if count else 0.0, position=position)
            for sent, position, count, factor in zip(rows.split(sizes), positions, taken, factors_, strict=True)
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
        weights: BlockWeights | None = None,
    ) -> Tensor:
        """`basis`: see `GnConv.forward`. `saving`: what is kept for the backward pass, see `HorNet.set_checkpointing`.

        weights: of `weights_of`, in training; made here if they are not given.
        A sample that drop path drops is not computed: what is left is gathered, and added where it belongs.
        """
        if infers():
            x = _add(x, self._infer_gnconv(x, keep[0], basis), keep[0])
            return _add(x, self._infer_mlp(x, keep[1]), keep[1])
        if weights is None:
            (weights,) = weights_of([self], [keep], x, basis)
        rows, position = keep[0].rows, keep[0].position
        x, f = self.gnconv.normed(x, weights.norm1, weights.gnconv, rows, position, basis, saving == "none")
        x = _add(x, f, keep[0])
        if weights.first is None or weights.second is None:
            return _add(x, self._infer_mlp(x, keep[1]), keep[1])
        rows, position, first, second = keep[1].rows, keep[1].position, weights.first, weights.second
        if saving == "selective_mlp":
            x, f = recompute.norm_mlp(x, weights.norm2, first, second, rows, position)
        else:
            x, h = recompute.norm_linear(x, weights.norm2, first, (), rows, position, saving == "none")
            f = recompute.gelu_linear(h, *second, saving == "none")
        return _add(x, f, keep[1])

    def _infer_gnconv(self, x: Tensor, keep: Keep, basis: FourierBasis | None) -> Tensor:
        f = self.gnconv(layer_norm(recompute.take_rows(x, keep.rows), norm_of(self.norm1)), basis)
        return f if self.gamma1 is None else f * (self.gamma1 * keep.factor).to(f.dtype)

    def _infer_mlp(self, x: Tensor, keep: Keep) -> Tensor:
        h = linear_of(self.pwconv1, layer_norm(recompute.take_rows(x, keep.rows), norm_of(self.norm2)))
        f = linear_of(self.pwconv2, F.gelu(h))
        return f if self.gamma2 is None else f * (self.gamma2 * keep.factor).to(f.dtype)


class BlockWeights(NamedTuple):
    """What a block multiplies by in training. `first` and `second`, of the MLP, None where the module alone knows."""

    norm1: Norm
    gnconv: GnConvWeights
    norm2: Norm
    first: Layer | None
    second: Layer | None


def weights_of(
    blocks: Sequence[Block], keeps: Sequence[tuple[Keep, Keep]], x: Tensor, basis: FourierBasis | None
) -> list[BlockWeights]:
    """Of blocks of one shape, for maps like `x`, all at once: see `folding`."""
    size = None if basis is None else (x.shape[1], x.shape[2])
    factors = [[keep[i].factor or 1.0 for keep in keeps] for i in range(2)]  # 0: see `_add`
    gammas = [[block.gamma1 for block in blocks], [block.gamma2 for block in blocks]]
    scales = [None if any(gamma is None for gamma in each) else cast(list[Tensor], each) for each in gammas]
    norms1, gnconvs = gnconv.weights_of(
        [block.gnconv for block in blocks], [norm_of(block.norm1) for block in blocks], scales[0], factors[0], x, size
    )
    norms2: Sequence[Norm] = [norm_of(block.norm2) for block in blocks]
    firsts: Sequence[Layer | None] = [None] * len(blocks)
    seconds = firsts
    if all(is_plain(block.pwconv1) for block in blocks):
        norms2, firsts = fold_into(norms2, [(block.pwconv1.weight, block.pwconv1.bias) for block in blocks], x)
        plain = [(block.pwconv2.weight, block.pwconv2.bias) for block in blocks]
        seconds = cast_layers(plain, x.dtype) if scales[1] is None else fold_rows(plain, scales[1], factors[1], x.dtype)
    return [BlockWeights(*each) for each in zip(norms1, gnconvs, norms2, firsts, seconds, strict=True)]


def infers() -> bool:
    """Without gradients; exports too, whether gradients are on or not: the one graph."""
    return not torch.is_grad_enabled() or kernels.exported()


def _add(x: Tensor, f: Tensor, keep: Keep) -> Tensor:
    if keep.mask is not None:
        return x + (f * keep.mask).to(x.dtype)
    if keep.factor == 0:  # of a sample that stands for none: see `draw_keeps`
        f = f * 0
    if keep.rows is None and not kernels.usable(x):
        return x + f
    return recompute.add_rows(x, f, keep.rows, keep.position)


def _sent(tensor: Tensor, like: Tensor) -> Tensor:
    """On the device of `like`, without waiting for it."""
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor.to(like.device)
