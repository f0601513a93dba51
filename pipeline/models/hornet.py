"""HorNet, registered with timm: `timm.create_model("hornet_large_gf", num_classes=1000)`.

Source: HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions, Rao et al. 2022.
State-dict keys, shapes and registration order are those of the published checkpoints, which load with
`strict=True`. Inside, activations are NHWC; images come in and feature maps go out as NCHW.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.ops.gnconv import (
    NORM_EPS,
    GlobalLocalFilter,
    GnConv,
    global_filter_size,
)

STRIDES = (4, 8, 16, 32)
LAYER_DECAY_LAYERS = 12  # depth scale of the published layer-wise learning-rate decay


class Block(nn.Module):
    """gnConv, then a two-layer MLP, each behind a LayerNorm, a layer scale and a residual.

    (B, H, W, dim) -> (B, H, W, dim). Source: HorNet, section 3.3.
    """

    def __init__(
        self,
        dim: int,
        order: int,
        filter_size: tuple[int, int] | None,
        drop_path: float,
        layer_scale_init: float,
    ) -> None:
        super().__init__()
        self.layer_scale_init = layer_scale_init
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale_init))
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale_init))
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.gnconv = GnConv(dim, order, filter_size)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma1 * self.gnconv(self.norm1(x)))
        hidden = F.gelu(self.pwconv1(self.norm2(x)))  # (B, H, W, 4 dim)
        return x + self.drop_path(self.gamma2 * self.pwconv2(hidden))


class HorNet(nn.Module):
    """Four stages of gnConv blocks at strides 4, 8, 16 and 32, then pooling, LayerNorm and a linear head.

    Args:
        in_chans: channels of the input.
        num_classes: width of the head; 0 leaves the head out.
        global_pool: "avg", or "" to keep the map: LayerNorm and head then act at every position.
        depths: blocks per stage.
        dims: width per stage.
        orders: order of the gnConv per stage.
        global_filter_stages: which stages (0-3) use the global-local filter instead of a 7x7 depthwise convolution.
        img_size: image size, (H, W) or one number, that stored global filters fit without being resized. Any
            other size works too. Only for models with global filters; 224 if not given.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block; grows linearly with the block index from 0.
        layer_scale_init: initial value of both layer scales of every block.

    Raises:
        ValueError: a width does not suit its order, an unknown `global_pool`, an `img_size` that is not a multiple
            of 32, or one given to a model without global filters.

    `forward`: (B, in_chans, H, W) with H and W multiples of 32 -> (B, num_classes); with `global_pool=""`
    (B, num_classes, H / 32, W / 32); with `num_classes=0` the normalised features.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 3, 18, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        orders: Sequence[int] = (2, 3, 4, 5),
        global_filter_stages: Sequence[int] = (),
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init: float = 1e-6,
    ) -> None:
        super().__init__()
        if img_size is not None and not global_filter_stages:
            raise ValueError(
                f"img_size={img_size} sizes global filters and this HorNet has none (it takes any image size): "
                "leave img_size out, or use a _gf model"
            )
        _check_global_pool(global_pool)
        img_size = img_size or 224
        image_hw = (img_size, img_size) if isinstance(img_size, int) else img_size
        _check_image_size(*image_hw)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(dims, STRIDES, strict=True))
        ]

        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4), LayerNorm2d(dims[0], eps=NORM_EPS))
        self.downsample_layers = nn.ModuleList([stem])
        for narrow, wide in itertools.pairwise(dims):
            self.downsample_layers.append(
                nn.Sequential(LayerNorm2d(narrow, eps=NORM_EPS), nn.Conv2d(narrow, wide, 2, stride=2))
            )

        self.stages = nn.ModuleList()
        n_blocks = sum(depths)
        for i, (depth, dim, order) in enumerate(zip(depths, dims, orders, strict=True)):
            filter_size = global_filter_size(image_hw, STRIDES[i]) if i in global_filter_stages else None
            before = sum(depths[:i])
            # Plain arithmetic, not linspace().item(): the model must build on the meta device.
            rates = [drop_path_rate * (before + j) / max(n_blocks - 1, 1) for j in range(depth)]
            self.stages.append(
                nn.Sequential(*(Block(dim, order, filter_size, rate, layer_scale_init) for rate in rates))
            )

        self.norm: nn.Module = nn.LayerNorm(dims[-1], eps=NORM_EPS)
        self.head: nn.Module = nn.Linear(dims[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Set every parameter to its initial value; for a model built on `meta`, call it after `to_empty`."""
        self.apply(_init_module)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the last stage's map (B, dims[-1], H / 32, W / 32).

        Raises:
            ValueError: H or W is not a multiple of 32.
        """
        _check_image_size(*x.shape[-2:])
        for i in range(len(self.stages)):
            x = self._forward_stage(i, x)
        return x

    def _forward_stage(self, i: int, x: Tensor) -> Tensor:
        x = self.downsample_layers[i](x).permute(0, 2, 3, 1)  # (B, H, W, C)
        x = x.contiguous()  # a no-op when the convolution already wrote channels_last memory
        for block in self.stages[i].children():
            # Per block, keeping the RNG state, so that drop path draws the same mask when recomputed.
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x.permute(0, 3, 1, 2)  # (B, C, H, W)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, LayerNorm, head: (B, C, H, W) -> (B, num_classes), or (B, C) with `pre_logits`.

        With `global_pool=""` the spatial dimensions stay, as the last two.
        """
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        if self.global_pool == "avg":
            x = x.mean((1, 2))  # (B, C)
        x = F.dropout(self.norm(x), self.drop_rate, self.training)
        x = x if pre_logits else self.head(x)
        return x if self.global_pool == "avg" else x.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after the chosen stages; timm's interface, which `features_only=True` goes through.

        Args:
            x: (B, in_chans, H, W).
            indices: stages to return: the last n if a number, all if None.
            norm: no effect: the only final LayerNorm acts on pooled features.
            stop_early: skip the stages after the last chosen one.
            output_fmt: only "NCHW".
            intermediates_only: return the list alone, not (last map, list).

        Raises:
            ValueError: H or W is not a multiple of 32, or another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: HorNet returns NCHW maps only")
        _check_image_size(*x.shape[-2:])
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for i in range(last + 1 if stop_early else len(self.stages)):
            x = self._forward_stage(i, x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages, norm and head that the maps at `indices` do not need; returns absolute indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        truncated = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.downsample_layers = self.downsample_layers[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or truncated:  # the norm is sized for the last stage
            self.norm = nn.Identity()
        if prune_head or truncated:
            self.reset_classifier(0, "")
        return take

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layer of each parameter name, for timm's layer-wise learning-rate decay.

        Fine: the published 14 layers. Stem 0; stages 1 and 2 are one layer each; stage 3 goes up by one every two
        blocks; stage 4 is 12; norm and head are 13. Each downsampling belongs to the stage it leads to, that of
        stage 3 to its first layer. Coarse: stem, four stages, head.
        """

        def layer_of(name: str) -> int:
            match = re.match(r"(downsample_layers|stages)\.(\d)\.(\d+)", name)
            if match is None:
                return 5 if coarse else LAYER_DECAY_LAYERS + 1
            is_downsampling, stage = match[1] == "downsample_layers", int(match[2])
            if is_downsampling and stage == 0:
                return 0
            if coarse or stage < 2:
                return stage + 1
            if stage == 3:
                return LAYER_DECAY_LAYERS
            block = 0 if is_downsampling else int(match[3])
            return min(3 + block // 2, LAYER_DECAY_LAYERS - 1)

        return layer_of

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head: a Linear, or Identity when `num_classes` is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh head of `num_classes` in place (0: none) and, if given, change the pooling.

        Raises:
            ValueError: `global_pool` is neither "avg" nor "".
        """
        if global_pool is not None:
            _check_global_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            _init_module(self.head)


def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()
    elif isinstance(module, GlobalLocalFilter):
        nn.init.normal_(module.complex_weight, std=0.02)
    elif isinstance(module, Block):
        nn.init.constant_(module.gamma1, module.layer_scale_init)
        nn.init.constant_(module.gamma2, module.layer_scale_init)


def _check_global_pool(global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f'global_pool={global_pool!r}: HorNet knows "avg" and "" (keep the map)')


def _check_image_size(height: int, width: int) -> None:
    if height % STRIDES[-1] or width % STRIDES[-1]:
        raise ValueError(
            f"image of {height}x{width}: HorNet halves the map down to stride {STRIDES[-1]}, so height and width "
            f"must be multiples of {STRIDES[-1]}: resize, crop or pad it"
        )
