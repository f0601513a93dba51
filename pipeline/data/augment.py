"""The recipe's augmentation on the host, from timm, with every draw keyed by the view (see keyed.py)."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.transforms import MaybeToTensor
from torchvision.transforms import Compose, Normalize

from pipeline.config.sections import Augment, Evaluate
from pipeline.data import decode


def seed_view(key: int) -> None:
    """Key Python's, NumPy's and torch's generators, all of which timm's transforms draw from.

    Call it in a data worker (or between steps): it sets global generators, and so serves one thread of a process.
    """
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    # Not torch.manual_seed: that also visits every accelerator's generator, which a data worker must not touch.
    torch.default_generator.manual_seed(int(words[2]))


class HostAugment:
    """timm's training transform for one resolution, of which only the crop is decoded.

    The result is that of timm's transform on the whole decoded image, to the last bit.
    """

    def __init__(self, augment: Augment, resolution: int) -> None:
        crop, self.rest = training_transform(augment, resolution)
        self.crop = crop.transforms[0]

    def __call__(self, data: bytes, key: int) -> torch.Tensor:
        """An image file -> normalised float32 (3, resolution, resolution). Raises DecodeError."""
        height, width = decode.image_size(data)
        seed_view(key)
        # timm asks an image for its size alone to draw the crop; this one takes no memory.
        box = self.crop.get_params(torch.empty(()).expand(3, height, width), self.crop.scale, self.crop.ratio)
        side, interpolation = self.crop.size[0], self.crop.interpolation.value
        if decode.COMPILED:
            return self.rest(Image.fromarray(decode.crop_resize(data, box, side, None, False, interpolation, False)))
        # Its stand-in's resize is off by one from PIL's here and there.
        image = Image.fromarray(decode.decode_region(data, *box))
        return self.rest(image.resize((side, side), decode.RESAMPLING[interpolation]))


def training_transform(augment: Augment, resolution: int) -> tuple[Compose, Compose]:
    """(crop, rest): PIL image of any size -> cropped PIL image -> normalised float tensor (3, resolution, resolution).

    They are apart because FFCV does the first part itself while it decodes. The crop does not flip; the rest does.
    Raises ValueError for a policy that timm cannot read.
    """
    try:
        parts = create_transform(
            input_size=resolution,
            is_training=True,
            scale=(augment.crop_area_min, 1.0),
            hflip=augment.horizontal_flip,
            auto_augment=augment.rand_augment,
            color_jitter=augment.color_jitter,
            interpolation=augment.interpolation,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            re_prob=augment.random_erasing,
            re_mode="pixel",
            separate=True,
        )
    except Exception as error:  # timm's parser fails in many ways
        raise ValueError(
            f"augment.rand_augment {augment.rand_augment!r}: timm cannot read it ({error or type(error).__name__}); "
            f"rand-m9-mstd0.5-inc1 is the published one, null is none"
        ) from error
    crop, *flips = parts[0].transforms
    return Compose([crop]), Compose([*flips, *parts[1].transforms, *parts[2].transforms])


def evaluation_transform(evaluate: Evaluate, resolution: int) -> Compose:
    """PIL image of any size -> PIL image (resolution, resolution); bicubic, as the paper evaluates."""
    whole = create_transform(
        input_size=resolution,
        is_training=False,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        crop_pct=evaluate.crop_ratio,
        crop_mode="center" if evaluate.resize == "crop" else "squash",
    )
    return Compose([part for part in whole.transforms if not isinstance(part, MaybeToTensor | Normalize)])


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) on any device -> float32, as torchvision's ToTensor and Normalize give it."""
    mean, std = (images.new_tensor(v, dtype=torch.float32) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return images.float().div_(255).sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
