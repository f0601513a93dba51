"""gnConv in the blocks of other nets: in the place of self-attention, of a depthwise or of any spatial convolution.

Source: HorNet, Rao et al. 2022, which claims it for both. The nets are timm's ViT and ConvNeXt with that one layer
changed, so stem, head, features, layer groups and checkpointing are timm's. In training gnConv keeps products and
convolutions alone for the backward pass (what `selective` is in HorNet); on a GPU its convolutions and gating are the
Triton kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import timm.models
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from pipeline.ops import kernels
from pipeline.ops.fourier import fourier_basis
from pipeline.ops.gnconv import GnConv
from pipeline.ops.layers import as_planes, compute_dtype, no_autocast

ORDERS = (2, 3, 4, 5)  # of ConvNeXt's stages: HorNet's


class GnConvOnMaps(nn.Module):
    """A gnConv in the place of a convolution: (B, in_channels, H, W) -> (B, channels, H, W), in channels_last memory.

    Args:
        in_channels, channels: `channels` a multiple of 2**(order - 1).
        filter_size: (h, w) of a stored global filter, or None for a 7x7 depthwise convolution.
        order: of the gnConv.
        scale: factor on the depthwise output: 1 in the published decoders, 1/3 in the backbones.

    Raises:
        ValueError: `channels` does not divide (see `GnConv`).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        filter_size: tuple[int, int] | None = None,
        order: int = 2,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.gnconv = GnConv(channels, order, filter_size, scale, in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return as_planes(self.on_nhwc(x.permute(0, 2, 3, 1)))

    def on_nhwc(self, x: Tensor) -> Tensor:
        """(B, H, W, in_channels) -> (B, H, W, channels), in the dtype of autocast where it is on."""
        x = x.to(compute_dtype(x) or x.dtype).contiguous()
        filtered = not isinstance(self.gnconv.dwconv, nn.Conv2d)
        lean = torch.is_grad_enabled() and not kernels.exported()
        with no_autocast(x.device.type):
            basis = fourier_basis(x.shape[1], x.shape[2], x.dtype, x.device) if filtered else None
            return (self.gnconv.lean if lean else self.gnconv)(x, basis)

    def init_weights(self) -> None:
        """PyTorch's for its convolutions, as the published decoders; a global filter as the backbone's."""
        for module in self.gnconv.modules():
            if isinstance(module, nn.Conv2d | nn.LayerNorm):
                module.reset_parameters()
            elif hasattr(module, "complex_weight"):
                nn.init.normal_(cast(Tensor, module.complex_weight), std=0.02)


class GnConvOnTokens(nn.Module):
    """A gnConv in the place of self-attention: tokens (B, H * W, dim) -> (B, H * W, dim), of a map without class token.

    grid: (H, W), set by the net before its blocks run.
    """

    def __init__(self, dim: int, filter_size: tuple[int, int] | None, order: int) -> None:
        super().__init__()
        self.map = GnConvOnMaps(dim, dim, filter_size, order, scale=1 / 3)
        self.grid = (0, 0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`attn_mask`, `is_causal`: for timm's blocks; a convolution has none."""
        assert attn_mask is None
        assert not is_causal
        return self.map.on_nhwc(x.unflatten(1, self.grid)).flatten(1, 2)


class GnConvVit(timm.models.VisionTransformer):
    """timm's ViT with gnConv for self-attention: pooled tokens, no class token, any image size.

    gnconv_order: of all blocks. gnconv_filters: global filters of `img_size`, not 7x7 depthwise convolutions.
    """

    def __init__(self, gnconv_order: int = 3, gnconv_filters: bool = False, **options: Any) -> None:
        super().__init__(**{"class_token": False, "global_pool": "avg", "dynamic_img_size": True, **options})
        height, width = self.patch_embed.grid_size
        filter_size = (height, width // 2 + 1) if gnconv_filters else None
        for block in self.blocks:
            block.attn = GnConvOnTokens(self.embed_dim, filter_size, gnconv_order)
        _init(self)

    def _pos_embed(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            cast(GnConvOnTokens, block.attn).grid = (x.shape[1], x.shape[2])
        return super()._pos_embed(x)


class GnConvNext(timm.models.ConvNeXt):
    """timm's ConvNeXt with a gnConv for the depthwise convolution of each block, of HorNet's orders by stage."""

    def __init__(self, gnconv_orders: Sequence[int] = ORDERS, **options: Any) -> None:
        super().__init__(**options)
        for stage, order in zip(self.stages, gnconv_orders, strict=True):
            for block in (module for module in stage.modules() if isinstance(module, ConvNeXtBlock)):
                channels = cast(nn.Conv2d, block.conv_dw).out_channels
                block.conv_dw = GnConvOnMaps(channels, channels, None, order, scale=1 / 3)
        _init(self)


def _init(model: nn.Module) -> None:
    """HorNet's initial values for what was put in."""
    for module in model.modules():
        if isinstance(module, GnConv):
            for part in module.modules():
                if isinstance(part, nn.Conv2d):
                    nn.init.trunc_normal_(part.weight, std=0.02)
                    if part.bias is not None:
                        nn.init.zeros_(part.bias)


def _create(net: type[nn.Module], variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> Any:
    return build_model_with_cfg(net, variant, pretrained, **{**defaults, **kwargs})


def _cfg(image_px: int, first_conv: str, classifier: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, image_px, image_px),
        "pool_size": (math.ceil(image_px / 32),) * 2,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
    }


_VIT, _CONVNEXT = ("patch_embed.proj", "head"), ("stem.0", "head.fc")
default_cfgs = generate_default_cfgs(
    {
        "vit_gnconv_nano": _cfg(64, *_VIT),
        "vit_gnconv_small_7x7": _cfg(224, *_VIT),
        "vit_gnconv_small_gf": _cfg(224, *_VIT),
        "convnext_gnconv_nano": _cfg(64, *_CONVNEXT),
        "convnext_gnconv_tiny": _cfg(224, *_CONVNEXT),
    }
)


def _vit(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> GnConvVit:
    features = {"out_indices": 3, "feature_cls": "getter"}
    net: GnConvVit = _create(GnConvVit, variant, pretrained, kwargs, feature_cfg=features, **defaults)
    return net


def _convnext(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> GnConvNext:
    features = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    net: GnConvNext = _create(GnConvNext, variant, pretrained, kwargs, feature_cfg=features, **defaults)
    return net


@register_model
def vit_gnconv_nano(pretrained: bool = False, **kwargs: Any) -> GnConvVit:
    """For 64 px images on a CPU: patches of 8, 6 blocks of 96 channels."""
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
    return _vit("vit_gnconv_nano", pretrained, kwargs, **sizes)


@register_model
def vit_gnconv_small_7x7(pretrained: bool = False, **kwargs: Any) -> GnConvVit:
    """The isotropic net of DeiT-S's size: 12 blocks of 384 channels on patches of 16."""
    return _vit("vit_gnconv_small_7x7", pretrained, kwargs, embed_dim=384, depth=12, num_heads=6)


@register_model
def vit_gnconv_small_gf(pretrained: bool = False, **kwargs: Any) -> GnConvVit:
    """`vit_gnconv_small_7x7` with global filters, stored for 224 px."""
    sizes = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return _vit("vit_gnconv_small_gf", pretrained, kwargs, gnconv_filters=True, **sizes)


@register_model
def convnext_gnconv_nano(pretrained: bool = False, **kwargs: Any) -> GnConvNext:
    """For 64 px images on a CPU."""
    return _convnext("convnext_gnconv_nano", pretrained, kwargs, depths=(1, 1, 4, 1), dims=(16, 32, 96, 192))


@register_model
def convnext_gnconv_tiny(pretrained: bool = False, **kwargs: Any) -> GnConvNext:
    """ConvNeXt-T's depths and HorNet-T's widths: a gnConv has 3.6 times the square of its channels in weights."""
    return _convnext("convnext_gnconv_tiny", pretrained, kwargs, depths=(3, 3, 9, 3), dims=(64, 128, 256, 512))
