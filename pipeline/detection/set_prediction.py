"""RT-DETRv2 and D-FINE on HorNet's three coarser maps, by transformers: a set of boxes at once, nothing to suppress.

Source: RT-DETR, Zhao et al. 2024, and RT-DETRv2, Lv et al. 2024; D-FINE, Peng et al. 2025. Encoder, decoder, matching
and losses are the library's (5.24), with the published figures but for what the configuration says. What differs:
- The maps are given to the encoder, and the library makes no backbone.
- LayerNorm over channels stands where batch norm did, whose running means are no weights: a resumed run would not be
  the same run, and few images a rank are a poor sample. What only looks like a weight is a constant.
- Under autocast the encoder alone is narrow: boxes in bf16 would be on a grid of 256 positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image

from pipeline.config.detect import DetectionModel
from pipeline.config.sections import ConfigError
from pipeline.dense.by_transformers import found_transformers, stand_in, unchecked
from pipeline.detection.base import Detector
from pipeline.detection.scenes import Found, Objects
from pipeline.ops.layers import NORM_EPS, as_planes, layer_norm, no_autocast, norm_of

STAGES, STRIDES = (1, 2, 3), (8, 16, 32)
ATTENTION_HEADS = 8


class SetDetector(Detector):
    """RT-DETRv2 or D-FINE.

    Losses, each the sum over all layers of the decoder, the encoder's choice and the denoised boxes: `loss_vfl`,
    `loss_bbox`, `loss_giou`, of D-FINE `loss_fgl` and `loss_ddf` too. They are divided by the number of true boxes in
    the micro-batch, as the library has it: how a batch is divided matters.

    Args:
        model: see `DetectionModel`.
        num_classes: of the data set.
        resolution: see `Detector`.

    Raises:
        ConfigError: transformers is not installed, or the figures do not fit together.
    """

    def __init__(self, model: DetectionModel, num_classes: int, resolution: int) -> None:
        _check(model, resolution)
        super().__init__(model, resolution, STAGES)
        self.detections = model.detections
        self.transformer: Any = _transformer(model, num_classes, self.widths)

    def losses(self, images: Tensor, objects: Sequence[Objects]) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        scale = images.new_tensor([width, height, width, height])
        labels = [
            {"class_labels": each.labels, "boxes": box_convert(each.boxes.float(), "xyxy", "cxcywh") / scale}
            for each in objects
        ]
        losses: dict[str, Tensor] = {}
        for name, loss in self._outputs(images, labels).loss_dict.items():
            kind = "_".join(name.split("_")[:2])  # loss_bbox of loss_bbox_aux_3
            losses[kind] = losses[kind] + loss if kind in losses else loss
        return losses

    def find(self, images: Tensor, size: tuple[int, int]) -> list[Found]:
        height, width = images.shape[-2:]
        outputs = self._outputs(images, None)
        boxes = box_convert(outputs.pred_boxes, "cxcywh", "xyxy") * images.new_tensor([width, height, width, height])
        scores, places = (
            outputs.logits.sigmoid().flatten(1).topk(min(self.detections, outputs.logits[0].numel()), sorted=True)
        )
        classes = outputs.logits.shape[2]
        found = []
        for image in range(len(images)):
            chosen = clip_boxes_to_image(boxes[image, places[image] // classes], size)
            inside = (chosen[:, 2:] > chosen[:, :2]).all(1)  # not in the padding alone
            found.append(Found(chosen[inside], scores[image][inside], (places[image] % classes)[inside], None))
        return found

    def dry_run(self, images: Tensor) -> None:
        trained = self.training
        with unchecked():
            self.eval()._outputs(images, None)  # in training it looks for infinities
        self.train(trained)

    def _outputs(self, images: Tensor, labels: list[dict[str, Tensor]] | None) -> Any:
        core = self.transformer.model
        projected = [project(map_) for project, map_ in zip(core.encoder_input_proj, self.maps(images), strict=True)]
        encoded = core.encoder(projected).last_hidden_state
        with no_autocast(images.device.type):
            # Without objects nothing is denoised. By this those weights get a gradient all the same, and after those of
            # the decoder in any case: DeepSpeed adds gradients of all ranks up in the order in which they come.
            nothing = 0 * core.denoising_class_embed.weight.float().sum()
            encoded = [each.float() + nothing for each in encoded]
            return self.transformer(
                pixel_values=None,
                inputs_embeds=images,  # of which it takes the device
                encoder_outputs=(encoded,),
                labels=labels,
            )


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position of (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return as_planes(layer_norm(input.permute(0, 2, 3, 1).contiguous(), norm_of(self)))


def _check(model: DetectionModel, resolution: int) -> None:
    if model.channels % ATTENTION_HEADS:
        raise ConfigError(
            f"model.channels {model.channels} is not a multiple of {ATTENTION_HEADS}, the heads of {model.head}"
        )
    positions = sum((resolution // stride) ** 2 for stride in STRIDES)
    if positions < model.queries:
        raise ConfigError(
            f"model.queries {model.queries} is more than the {positions} positions of crops of data.resolution "
            f"{resolution}: lower it, or make the crops larger"
        )


def _transformer(model: DetectionModel, num_classes: int, widths: list[int]) -> Any:
    """The library's model without a backbone, whose every weight learns, and whose state is its weights."""
    transformers = found_transformers(model.head)
    make_config, make = {
        "rt-detr-v2": (transformers.RTDetrV2Config, transformers.RTDetrV2ForObjectDetection),
        "d-fine": (transformers.DFineConfig, transformers.DFineForObjectDetection),
    }[model.head]
    whole: Any = make(
        make_config(
            backbone_config=stand_in(widths),
            freeze_backbone_batch_norms=False,
            num_labels=num_classes,
            num_queries=model.queries,
            encoder_in_channels=widths,
            feat_strides=list(STRIDES),
            encoder_hidden_dim=model.channels,
            encoder_ffn_dim=model.head_channels,
            encoder_attention_heads=ATTENTION_HEADS,
            d_model=model.channels,
            decoder_in_channels=[model.channels] * len(STRIDES),
            decoder_ffn_dim=model.head_channels,
            decoder_attention_heads=ATTENTION_HEADS,
        )
    )
    whole.model.backbone = nn.Identity()
    del whole.class_embed, whole.bbox_embed  # the decoder's, by other names
    for module in list(whole.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, ChannelNorm(child.num_features, eps=NORM_EPS))
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
        module._non_persistent_buffers_set.update(module._buffers)
    assert not any("backbone" in name for name in whole.state_dict())
    return whole
