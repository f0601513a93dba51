"""A stage of HorNet: its blocks, and what of them is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.block import Block, BlockWeights, Keep, Saving, infers, weights_of
from pipeline.ops import kernels
from pipeline.ops.fourier import FourierBasis

Policy = Literal["none", "selective", "selective_mlp", "block", "stage"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class Stage(nn.Sequential):
    """Blocks on maps of one size: (B, H, W, C) -> (B, H, W, C)."""

    @property
    def compiled(self) -> bool:
        """Whether torch.compile has its blocks: asked each time, since a deep copy of a compiled block is not."""
        first = next(self.children(), None)
        return first is not None and first._compiled_call_impl is not None

    def forward(  # type: ignore[override]
        self, x: Tensor, keeps: Sequence[tuple[Keep, Keep]], basis: FourierBasis | None, policy: Policy
    ) -> Tensor:
        """`keeps`: what drop path leaves of each block; `basis`: see `Block`; `policy`: see `HorNet.set_checkpointing`.

        Drop path is drawn outside: nothing random is recomputed.
        """
        if policy == "none" and not self.compiled and kernels.usable(x):
            policy = "selective"  # the kernels are spelled that way alone: what it recomputes is free there
        # What is recomputed is kept as selective keeps it.
        saving: Saving = "selective" if policy == "block" or policy == "stage" else policy
        blocks = cast(list[Block], list(self.children()))
        weights: Sequence[BlockWeights | None] = [None] * len(blocks)
        if not infers() and _at_once(blocks):
            weights = weights_of(blocks, keeps, x, basis)
        if policy == "stage" and torch.is_grad_enabled():
            return _checkpointed(self._blocks, x, keeps, weights, basis, saving, False)
        return self._blocks(x, keeps, weights, basis, saving, policy == "block" and torch.is_grad_enabled())

    def _blocks(
        self,
        x: Tensor,
        keeps: Sequence[tuple[Keep, Keep]],
        weights: Sequence[BlockWeights | None],
        basis: FourierBasis | None,
        saving: Saving,
        each: bool,
    ) -> Tensor:
        """The blocks in turn, `each` of them checkpointed or not."""
        for block, keep, prepared in zip(self.children(), keeps, weights, strict=True):
            run = (block, x, keep, basis, saving, prepared)
            x = _checkpointed(*run) if each else block(*run[1:])
        return x


def _at_once(blocks: Sequence[nn.Module]) -> bool:
    """Whether the weights of all are asked for before the first runs. Not where a hook brings those of each (ZeRO stage
    3, FSDP), and not of blocks that differ, or are none of ours, as whoever prunes a net leaves them.
    """
    if any(not isinstance(block, Block) or block._forward_pre_hooks for block in blocks):
        return False
    return len({_layout(cast(Block, block)) for block in blocks}) == 1


def _layout(block: Block) -> tuple[Any, ...]:
    inner, context = block.gnconv, block.gnconv.dwconv
    return *inner.dims, inner.scale, type(context), getattr(block.pwconv1, "out_features", None)


def _checkpointed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
