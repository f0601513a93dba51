"""The recipe's augmentation, from timm, with every draw keyed by (seed, epoch, sample).

A keyed draw does not depend on which worker, rank or run makes it, so an image is augmented alike after a resume and on
any number of ranks.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision.transforms import Compose

from pipeline.config import Augment, Evaluate


def seed_sample(seed: int, epoch: int, sample: int) -> None:
    """Key Python's, NumPy's and torch's generators, all of which timm's transforms draw from.

    Call it in a data worker (or between steps): it sets global generators.
    """
    key = np.random.SeedSequence((seed, epoch, sample)).generate_state(3)
    random.seed(int(key[0]))
    np.random.seed(int(key[1]))
    # Not torch.manual_seed: that also visits every accelerator's generator, which a data worker must not touch.
    torch.default_generator.manual_seed(int(key[2]))


def training_transform(augment: Augment, resolution: int) -> tuple[Compose, Compose]:
    """(crop, rest): PIL image of any size -> cropped PIL image -> normalised float tensor (3, resolution, resolution).

    They are apart because FFCV does the first part itself while it decodes. The crop does not flip; the rest does.
    """
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
    crop, *flips = parts[0].transforms
    return Compose([crop]), Compose([*flips, *parts[1].transforms, *parts[2].transforms])


def evaluation_transform(evaluate: Evaluate, resolution: int) -> Compose:
    """PIL image of any size -> normalised float tensor (3, resolution, resolution); bicubic, as the paper evaluates."""
    return create_transform(
        input_size=resolution,
        is_training=False,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        crop_pct=evaluate.crop_ratio,
        crop_mode="center" if evaluate.resize == "crop" else "squash",
    )


def normalise_decoded(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) already at the input resolution -> normalised float (B, 3, H, W)."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN).mul(255).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_DEFAULT_STD).mul(255).view(1, 3, 1, 1)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().sub(mean).div(std)


def augment_decoded(rest: Compose, image: np.ndarray) -> torch.Tensor:
    """Apply `rest` of `training_transform` to a decoded crop, uint8 (H, W, 3)."""
    return rest(Image.fromarray(image))
