"""Mask2Former's head on HorNet's four maps, by transformers: queries, each with a class and a mask; and its loss.

Source: Masked-attention Mask Transformer, Cheng et al. 2022. Layers, matching and losses are the library's (5.24) with
the published figures: 6 layers in the pixel decoder, 9 behind it, 100 queries, 12,544 points of each mask. The head is
float32 under autocast too, as the published pixel decoder is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.dense_set import IGNORED
from pipeline.config.dense import MASK2FORMER
from pipeline.dense.by_transformers import found_transformers, quiet, stand_in, unchecked
from pipeline.ops.layers import no_autocast

CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0  # of the losses, as published
LEAST_SCORE = 1e-8


class Predictions(NamedTuple):
    """What each layer of the decoder says in training, the last one last.

    classes: of (B, queries, num_classes + 1), the last for no class; masks: of (B, queries, H // 4, W // 4), logits.
    """

    classes: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]


class Mask2FormerHead(nn.Module):
    """Four maps (B, C_i, H_i, W_i) of strides 4 to 32 -> Predictions in training; in eval mode logarithms of scores
    (B, num_classes, H, W) of the whole image: over queries the sum of a class's probability times the mask's.

    Args:
        in_channels: of the maps.
        channels: of all that is inside, a multiple of 32.
        num_classes: of the data set.

    Raises:
        ConfigError: transformers is not installed.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__()
        config = _config(in_channels, channels, num_classes)
        whole = found_transformers(MASK2FORMER).Mask2FormerForUniversalSegmentation(config)
        self.pixels: Any = whole.model.pixel_level_module.decoder
        self.queries: Any = whole.model.transformer_module
        self.classifier: nn.Linear = whole.class_predictor
        # The library makes this one on the CPU, wherever all others are made.
        self.pixels.level_embed = nn.Parameter(self.pixels.level_embed.detach().to(self.classifier.weight.device))

    def forward(self, maps: Sequence[Tensor]) -> Predictions | Tensor:
        with no_autocast(maps[0].device.type):
            if maps[0].is_meta:
                with unchecked():
                    return self._predicted([each.float() for each in maps])
            return self._predicted([each.float() for each in maps])

    def _predicted(self, maps: list[Tensor]) -> Predictions | Tensor:
        pixels = self.pixels(maps, output_hidden_states=False, output_attentions=False, return_dict=True)
        outputs = self.queries(multi_scale_features=pixels.multi_scale_features, mask_features=pixels.mask_features)
        hidden = outputs.intermediate_hidden_states  # of (queries, B, channels)
        if self.training:
            classes = tuple(self.classifier(each.transpose(0, 1)) for each in hidden)
            return Predictions(classes, tuple(outputs.masks_queries_logits))
        classes = self.classifier(hidden[-1].transpose(0, 1)).softmax(-1)[..., :-1]
        masks = F.interpolate(outputs.masks_queries_logits[-1], scale_factor=4, mode="bilinear", align_corners=False)
        return torch.einsum("bqc,bqhw->bchw", classes, masks.sigmoid()).clamp_min(LEAST_SCORE).log()


def mask2former_loss(num_classes: int) -> Callable[[Predictions, Tensor], Tensor]:
    """Loss of what a Mask2FormerHead returns in training against masks (B, H, W): of each layer, matched by itself.

    Each class that an image shows is one true mask; ignored pixels are in none. Losses of masks are divided by the
    number of true masks in the micro-batch, those of classes by the weights of its queries, as the library has it: how
    a batch is divided matters. Points are drawn from torch's random state.
    """
    library = found_transformers(MASK2FORMER)
    weights = {"loss_cross_entropy": CLASS_WEIGHT, "loss_mask": MASK_WEIGHT, "loss_dice": DICE_WEIGHT}
    criterion = library.models.mask2former.modeling_mask2former.Mask2FormerLoss(
        _config([32] * 4, 32, num_classes), weights
    )

    def loss(outputs: Predictions, masks: Tensor) -> Tensor:
        labels = [each[each != IGNORED].unique() for each in masks]
        binary = [(each == own[:, None, None]).float() for each, own in zip(masks, labels, strict=True)]
        *earlier, last = [
            {"masks_queries_logits": logits, "class_queries_logits": classes}
            for classes, logits in zip(outputs.classes, outputs.masks, strict=True)
        ]
        parts = criterion.to(masks.device)(
            **last, mask_labels=binary, class_labels=labels, auxiliary_predictions=earlier
        )
        return torch.stack([weights[name.rstrip("_0123456789")] * part for name, part in parts.items()]).sum()

    return loss


def _config(in_channels: Sequence[int], channels: int, num_classes: int) -> Any:
    make = found_transformers(MASK2FORMER).Mask2FormerConfig
    with quiet():
        return make(
            backbone_config=stand_in(in_channels),
            feature_size=channels,
            mask_feature_size=channels,
            hidden_dim=channels,
            encoder_feedforward_dim=4 * channels,
            dim_feedforward=8 * channels,
            num_labels=num_classes,
            class_weight=CLASS_WEIGHT,
            mask_weight=MASK_WEIGHT,
            dice_weight=DICE_WEIGHT,
        )
