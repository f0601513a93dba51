"""The HorNet variants, registered with timm under the names of the published models.

Source: HorNet, Rao et al. 2022, section 3.3 and table 1: depths 2/3/18/2, widths C/2C/4C/8C and gnConv orders
2/3/4/5; the GF models use the global-local filter in the last two stages.
"""

import difflib
import inspect
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from pipeline.models.features import StageMaps
from pipeline.models.hornet import HorNet
from pipeline.ops.global_filter import resize_global_filters

TINY, SMALL, BASE, LARGE = 64, 96, 128, 192  # width of the first stage
GF = (2, 3)  # stages with the global-local filter


def _widths(first: int) -> tuple[int, ...]:
    return first, 2 * first, 4 * first, 8 * first


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **defaults: Any) -> HorNet:
    """Build `variant` from its `defaults`; `kwargs`, what the caller gave, wins."""
    _refuse_unknown_options(variant, kwargs)
    if kwargs.get("feature_cls", "getter") != "getter":
        raise ValueError(
            f"{variant}: feature_cls={kwargs['feature_cls']!r}: maps inside are NHWC, so features come from "
            "forward_intermediates alone; leave feature_cls out"
        )
    kwargs.pop("feature_cls", None)
    return build_model_with_cfg(
        HorNet,
        variant,
        pretrained,
        pretrained_filter_fn=resize_global_filters,
        # The modules are not one sequence, so features go through HorNet.forward_intermediates.
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": StageMaps},
        **{**defaults, **kwargs},
    )


def _refuse_unknown_options(variant: str, kwargs: dict[str, Any]) -> None:
    """Raise TypeError naming the nearest option, before timm's own keywords hide which side it was meant for."""
    model_options = set(inspect.signature(HorNet).parameters)
    timm_options = set(inspect.signature(build_model_with_cfg).parameters) - {"kwargs"}
    timm_options |= {"features_only", "out_indices", "feature_cls"}  # taken out of **kwargs there
    for name in kwargs.keys() - model_options - timm_options:
        near = difflib.get_close_matches(name, model_options, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TypeError(f"{variant}: unknown option {name!r}: {hint}Options are {', '.join(sorted(model_options))}")


def _cfg(image_px: int = 224) -> dict[str, Any]:
    # The published evaluation: 384 is warped to the square uncropped, 224 is the centre of a resize to 256.
    crop = {"crop_pct": 1.0, "crop_mode": "squash"} if image_px >= 384 else {"crop_pct": 0.875}
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, image_px, image_px),
        "pool_size": (image_px // 32, image_px // 32),
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "downsample_layers.0.0",
        "classifier": "head",
        "paper_ids": "arXiv:2207.14284",
        "paper_name": "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions",
        "origin_url": "https://github.com/raoyongming/HorNet",
        **crop,
    }


default_cfgs = generate_default_cfgs(
    {
        "hornet_nano_gf": _cfg(64),
        "hornet_tiny_7x7": _cfg(),
        "hornet_tiny_gf": _cfg(),
        "hornet_small_7x7": _cfg(),
        "hornet_small_gf": _cfg(),
        "hornet_base_7x7": _cfg(),
        "hornet_base_gf": _cfg(),
        "hornet_base_gf_img384": _cfg(384),
        "hornet_large_7x7": _cfg(),
        "hornet_large_gf": _cfg(),
        "hornet_large_gf_img384": _cfg(384),
    }
)


# What timm passes to every entry point (pretrained_cfg, cache_dir, ...) goes through **kwargs to
# build_model_with_cfg untouched; `_refuse_unknown_options` sees to it that nothing else does.


@register_model
def hornet_nano_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """1.0 M parameters for 64 px images on a CPU; not a published model.

    Its maps are 16, 8, 4 and 2 pixels wide, so blocks and parameters go where positions are few: that trains 1.5
    times as many images a second as an even 24/48/96/192 with depths 2/2/4/1 of the same size.
    """
    return _create(
        "hornet_nano_gf",
        pretrained,
        kwargs,
        depths=(1, 1, 4, 1),
        dims=(16, 32, 96, 192),
        global_filter_stages=GF,
        img_size=64,
    )


@register_model
def hornet_tiny_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """22 M parameters, 4.0 GMACs at 224 px."""
    return _create("hornet_tiny_7x7", pretrained, kwargs, dims=_widths(TINY))


@register_model
def hornet_tiny_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """23 M parameters, 3.9 GMACs at 224 px."""
    return _create("hornet_tiny_gf", pretrained, kwargs, dims=_widths(TINY), global_filter_stages=GF)


@register_model
def hornet_small_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """50 M parameters, 8.8 GMACs at 224 px."""
    return _create("hornet_small_7x7", pretrained, kwargs, dims=_widths(SMALL))


@register_model
def hornet_small_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """50 M parameters, 8.7 GMACs at 224 px."""
    return _create("hornet_small_gf", pretrained, kwargs, dims=_widths(SMALL), global_filter_stages=GF)


@register_model
def hornet_base_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """87 M parameters, 15.6 GMACs at 224 px."""
    return _create("hornet_base_7x7", pretrained, kwargs, dims=_widths(BASE))


@register_model
def hornet_base_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """88 M parameters, 15.5 GMACs at 224 px."""
    return _create("hornet_base_gf", pretrained, kwargs, dims=_widths(BASE), global_filter_stages=GF)


@register_model
def hornet_base_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """`hornet_base_gf` with filters stored for 384 px: 24x13 and 12x7."""
    return _create(
        "hornet_base_gf_img384", pretrained, kwargs, dims=_widths(BASE), global_filter_stages=GF, img_size=384
    )


@register_model
def hornet_large_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """195 M parameters, 34.8 GMACs at 224 px."""
    return _create("hornet_large_7x7", pretrained, kwargs, dims=_widths(LARGE))


@register_model
def hornet_large_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """196 M parameters, 34.7 GMACs at 224 px."""
    return _create("hornet_large_gf", pretrained, kwargs, dims=_widths(LARGE), global_filter_stages=GF)


@register_model
def hornet_large_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """`hornet_large_gf` with filters stored for 384 px, 24x13 and 12x7; 101.8 GMACs there."""
    return _create(
        "hornet_large_gf_img384",
        pretrained,
        kwargs,
        dims=_widths(LARGE),
        global_filter_stages=GF,
        img_size=384,
    )
