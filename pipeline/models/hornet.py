"""HorNet, registered with timm: `timm.create_model("hornet_large_gf", num_classes=1000)`.

Source: HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions, Rao et al. 2022.
State-dict keys, shapes and registration order are those of the published checkpoints, which load with
`strict=True`. Inside, activations are NHWC; images come in and feature maps go out as NCHW.

Below a block, modules hold parameters and are not called: what wraps or hooks a layer (LoRA adapters, pruning, forward
hooks) acts on stages, blocks and the head alone. Gradients cannot be differentiated again.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from pipeline.models import layer_decay
from pipeline.models.block import KEEP_ALL, Block, Keep, draw_keeps
from pipeline.models.dilation import at_all_offsets, at_offsets, whole
from pipeline.models.downsample import downsample, make_downsampling, make_stem
from pipeline.models.stage import POLICIES, Policy, Stage
from pipeline.ops import kernels, selfcheck
from pipeline.ops.fourier import fourier_basis
from pipeline.ops.global_filter import GlobalLocalFilter, global_filter_size
from pipeline.ops.layers import NORM_EPS, as_planes, compute_dtype, no_autocast

STRIDES = (4, 8, 16, 32)
kernels.try_by(selfcheck.disagreement)


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
        output_stride: stride of the coarsest map: 32, or 16 or 8 by dilation (see `dilation`). The weights are the
            same.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block; grows linearly with the block index from 0.
        layer_scale_init: initial value of both layer scales of every block.

    Raises:
        ValueError: a width does not suit its order, an unknown `global_pool` or `output_stride`, a `drop_path_rate` of
            1, an `img_size` below 32, or one given to a model without global filters.

    `forward`: (B, in_chans, H, W), H and W at least 32 -> (B, num_classes); with `global_pool=""` (B, num_classes,
    H // 32, W // 32); with `num_classes=0` the normalised features. Of a size that is no multiple of 32, each stage
    leaves out the last rows and columns that fill no patch of its convolution, as the published models do.
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
        output_stride: int = 32,
    ) -> None:
        super().__init__()
        if output_stride not in STRIDES[1:]:
            raise ValueError(
                f"output_stride={output_stride}: HorNet's coarsest map has stride 32, or 16 or 8 by dilation"
            )
        if img_size is not None and not global_filter_stages:
            raise ValueError(
                f"img_size={img_size} sizes global filters and this HorNet has none (it takes any image size): "
                "leave img_size out, or use a _gf model"
            )
        _check_global_pool(global_pool)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate}: a share of the samples, at least 0 and below 1")
        img_size = img_size or 224
        image_hw = (img_size, img_size) if isinstance(img_size, int) else img_size
        _check_image_size(*image_hw)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.output_stride = output_stride
        self.num_features = self.head_hidden_size = dims[-1]
        self.checkpointing: tuple[Policy, ...] = tuple("none" for _ in dims)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": min(stride, output_stride), "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(dims, STRIDES, strict=True))
        ]

        between = (make_downsampling(narrow, wide) for narrow, wide in itertools.pairwise(dims))
        self.downsample_layers = nn.ModuleList([make_stem(in_chans, dims[0]), *between])

        self.filters = tuple(i in global_filter_stages for i in range(len(dims)))
        self.stages = nn.ModuleList()
        n_blocks = sum(depths)
        for i, (depth, dim, order) in enumerate(zip(depths, dims, orders, strict=True)):
            filter_size = global_filter_size(image_hw, STRIDES[i]) if i in global_filter_stages else None
            before = sum(depths[:i])
            # Plain arithmetic, not linspace().item(): the model must build on the meta device.
            rates = [drop_path_rate * (before + j) / max(n_blocks - 1, 1) for j in range(depth)]
            self.stages.append(Stage(*(Block(dim, order, filter_size, rate, layer_scale_init) for rate in rates)))

        self.norm: nn.Module = nn.LayerNorm(dims[-1], eps=NORM_EPS)
        self.head: nn.Module = nn.Linear(dims[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Set every parameter to its initial value; for a model built on `meta`, call it after `to_empty`."""
        self.apply(_init_module)

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """(B, in_chans, H, W) -> the last stage's map (B, dims[-1], H // 32, W // 32).

        `masks`: see `forward`.

        Raises:
            ValueError: H or W is below 32; integers; without autocast, another dtype than the weights'.
        """
        last = len(self.stages) - 1
        return self._stage_maps(x, last + 1, [last], masks)[0]

    def _stage_maps(self, x: Tensor, stages: int, wanted: Collection[int], masks: Tensor | None = None) -> list[Tensor]:
        """The `wanted` ones of the maps after the first `stages` stages, (B, C, H, W) in channels_last memory."""
        height, width = x.shape[-2:]
        _check_image_size(height, width)
        maps: list[Tensor] = []
        dtype, weights = compute_dtype(x), cast(nn.Conv2d, self.downsample_layers[0][0]).weight.dtype  # type: ignore[index]
        if not x.is_floating_point() or (dtype is None and x.dtype != weights):
            raise ValueError(f"images are {x.dtype} and weights {weights}: convert one of them, or use autocast")
        with no_autocast(x.device.type):
            x = x.permute(0, 2, 3, 1).to(dtype or x.dtype)
            keeps, batch = self._draw_keeps(x, masks), x.shape[0]
            for i in range(stages):
                stride = min(STRIDES[i], self.output_stride)
                dilation = STRIDES[i] // stride
                kept = [(at_all_offsets(a, batch, dilation), at_all_offsets(b, batch, dilation)) for a, b in keeps[i]]
                x = self._forward_stage(i, x, kept, dilation > 1)
                if i in wanted:
                    map_ = x if dilation == 1 else whole(x, dilation, (height // stride, width // stride))
                    maps.append(as_planes(map_))
        return maps

    def draw_masks(self, batch: int) -> Tensor:
        """What drop path leaves of `batch` images, as `forward` takes it: (draws, batch, 1, 1, 1), float32, on the CPU.

        The draws are those that `forward` makes, in their order: of each branch that may be dropped, see `Keep.mask`.
        """
        drawn = draw_keeps(self.drop_path_rates(), batch, torch.empty(0, device="cpu"), masks=True)
        masks = [keep.mask for keep in drawn if keep.mask is not None]
        return torch.stack(masks) if masks else torch.empty(0, batch, 1, 1, 1, device="cpu")

    def drop_path_rates(self) -> list[float]:
        """Of the two branches of every block, in turn."""
        blocks = (cast(Block, block) for stage in self.stages for block in stage.children())
        return [block.drop_path_rate for block in blocks for _ in range(2)]

    def _draw_keeps(self, x: Tensor, given: Tensor | None) -> list[list[tuple[Keep, Keep]]]:
        """For each block of each stage, what drop path leaves of its two branches. `given`: masks, see `forward`."""
        if not self.training:
            return [[(KEEP_ALL, KEEP_ALL) for _ in stage.children()] for stage in self.stages]
        rates = self.drop_path_rates()
        if given is None:
            masks = torch.compiler.is_compiling() or any(cast(Stage, stage).compiled for stage in self.stages)
            drawn = iter(draw_keeps(rates, len(x), x, masks=masks))
        else:
            each = iter(given.to(torch.promote_types(x.dtype, torch.float32)))
            drawn = iter([Keep(mask=next(each)) if rate > 0 else KEEP_ALL for rate in rates])
        return [[(next(drawn), next(drawn)) for _ in stage.children()] for stage in self.stages]

    def _forward_stage(self, i: int, x: Tensor, keeps: list[tuple[Keep, Keep]], dilated: bool) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C'), where it is `dilated` of the maps at all offsets."""
        policy: Policy = "none" if kernels.exported() else self.checkpointing[i]
        lean = policy != "none" or kernels.usable(x)
        halve = partial(downsample, self.downsample_layers[i], lean=lean)
        x = at_offsets(halve, x) if dilated else halve(x)
        basis = fourier_basis(x.shape[1], x.shape[2], x.dtype, x.device) if self.filters[i] else None
        return self.stages[i](x, keeps, basis, policy)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, LayerNorm, head: (B, C, H, W) -> (B, num_classes), or (B, C) with `pre_logits`.

        With `global_pool=""` the spatial dimensions stay, as the last two. In eval mode all of it is in the dtype of
        the norm's parameters, whatever autocast says: logits rounded to bf16 are equal where the classes are not.
        """
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        if self.training:
            return self._head(x, pre_logits)
        with no_autocast(x.device.type):
            weight = getattr(self.norm, "weight", None)  # Identity has none
            return self._head(x if weight is None else x.to(weight.dtype), pre_logits)

    def _head(self, x: Tensor, pre_logits: bool) -> Tensor:
        """(B, H, W, C) -> as `forward_head`."""
        if self.global_pool == "avg":
            x = x.mean((1, 2))  # (B, C)
        x = F.dropout(self.norm(x), self.drop_rate, self.training)
        x = x if pre_logits else self.head(x)
        return x if self.global_pool == "avg" else x.permute(0, 3, 1, 2)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """`masks`: of `draw_masks`, on the device of `x`; None: drawn here. No effect in eval mode."""
        return self.forward_head(self.forward_features(x, masks))

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
            ValueError: H or W is below 32, or another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: HorNet returns NCHW maps only")
        take, last = feature_take_indices(len(self.stages), indices)
        stages = last + 1 if stop_early else len(self.stages)
        maps = self._stage_maps(x, stages, {*take, stages - 1})
        intermediates = maps if stages - 1 in take else maps[:-1]
        return intermediates if intermediates_only else (maps[-1], intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages, norm and head that the maps at `indices` do not need; returns absolute indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        truncated = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.downsample_layers = self.downsample_layers[: last + 1]
        self.checkpointing = self.checkpointing[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or truncated:  # the norm is sized for the last stage
            self.norm = nn.Identity()
        if prune_head or truncated:
            self.reset_classifier(0, "")
        return take

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layer of each parameter name, for timm's layer-wise learning-rate decay; see `layer_decay`."""
        return partial(layer_decay.layer_of, coarse=coarse)

    def set_checkpointing(self, policy: Policy | Sequence[Policy]) -> None:
        """What is kept for the backward pass, for all stages or stage by stage. Values and gradients do not change.

        - none: what plain autograd keeps (on a GPU with the Triton kernels, the same as selective).
        - selective: outputs of matrix products and convolutions; LayerNorm, GELU and gating products are recomputed.
        - selective_mlp: and the hidden layer of the MLP, the widest tensor there is, is recomputed by its product.
        - block: the input of each block; a forward pass more.
        - stage: the input of the stage; a forward pass more, and in backward the whole stage is held as selective.

        Raises:
            ValueError: an unknown policy, or a sequence that is not one a stage.
        """
        policies = (policy,) * len(self.stages) if isinstance(policy, str) else tuple(policy)
        unknown = [each for each in policies if each not in POLICIES]
        if unknown or len(policies) != len(self.stages):
            raise ValueError(
                f"checkpointing {policy!r}: one of {', '.join(POLICIES)}, or {len(self.stages)} of them, one a stage"
            )
        self.checkpointing = policies

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch: policy block, or none."""
        self.set_checkpointing("block" if enable else "none")

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile each block, in place; names and shapes of the state stay. `options` are torch.compile's.

        Blocks of a stage share their code. Drop path then masks instead of leaving samples out: shapes are fixed.
        For the process, torch._dynamo's recompile_limit is raised to 64, and torch._functorch's common-subexpression
        elimination turned off: what backward is to recompute would be found in forward, and kept.
        """
        # A graph for each stage, with and without gradients, and drop path or none in the first block.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        torch._functorch.config.cse = False
        for stage in self.stages:
            for block in stage.children():
                block.compile(**{"dynamic": False, **options})

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
        for gamma in (module.gamma1, module.gamma2):
            nn.init.constant_(cast(Tensor, gamma), module.layer_scale_init)


def _check_global_pool(global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f'global_pool={global_pool!r}: HorNet knows "avg" and "" (keep the map)')


def _check_image_size(height: int, width: int) -> None:
    if height < STRIDES[-1] or width < STRIDES[-1]:
        raise ValueError(
            f"image of {height}x{width}: HorNet halves the map down to stride {STRIDES[-1]}, so height and width must "
            f"be at least {STRIDES[-1]}: resize or pad it"
        )
