"""The configuration of a detection: its own sections data, augment, model and evaluate."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.dense import DenseData, check_sides
from pipeline.config.fields import Count, Fraction, Positive, Section
from pipeline.config.run import RunConfig
from pipeline.config.sections import Backbone

SET_PREDICTORS = ("rt-detr-v2", "d-fine")  # heads that find a set of boxes at once, without masks


class DetectionAugment(Section):
    """Training augmentation of an image, its boxes and masks together: large-scale jitter, mirrored; then colours."""

    scale_min: Positive = Field(
        description="the image is resized so that it just fits into the crop's square, times a scale from here on"
    )
    scale_max: Positive
    box_side_min_px: Annotated[float, Field(ge=0)] = Field(
        description="boxes of which less than this is left in the crop, by width or height, are left out"
    )
    horizontal_flip: Fraction
    photometric: Fraction = Field(
        description="brightness, contrast, saturation and hue, each with this probability; 0: none"
    )

    @model_validator(mode="after")
    def _scales_fit(self) -> DetectionAugment:
        if self.scale_min > self.scale_max:
            raise ValueError(f"augment.scale_min {self.scale_min:g} is above augment.scale_max {self.scale_max:g}")
        return self


class DetectionModel(Backbone):
    """A backbone of timm's registry, and what finds boxes on its maps."""

    head: Literal["mask-rcnn", "cascade-mask-rcnn", "rt-detr-v2", "d-fine"] = Field(
        description="mask-rcnn: one box head; cascade-mask-rcnn: three, each for better boxes than the one before; "
        "rt-detr-v2, d-fine: transformers that find a set of boxes, without masks"
    )
    pyramid: Literal["fpn", "horfpn"] = Field(description="under the R-CNN heads; horfpn: with gnConv in its levels")
    channels: Count = Field(description="of the pyramid, or of the transformer")
    head_channels: Count = Field(description="of the R-CNN box heads' hidden layers, or of the transformer's MLPs")
    masks: bool = Field(description="train the mask head too; the transformers have none: false there")
    queries: Count = Field(description="boxes that a transformer finds in an image")
    anchor_px: Positive = Field(description="side of the R-CNN anchors on the finest map; twice that on each coarser")
    sampled: Count = Field(
        description="boxes of an image that an R-CNN's heads learn from, up to a quarter with objects"
    )
    detections: Count = Field(description="kept of an image, by score")
    compile: ClassVar[bool] = False
    cuda_graphs: ClassVar[bool] = False

    @model_validator(mode="after")
    def _has_masks(self) -> DetectionModel:
        if self.masks and self.head in SET_PREDICTORS:
            raise ValueError(f"model.masks is true, and model.head {self.head} finds boxes alone: set it to false")
        if self.pyramid == "horfpn" and self.head not in SET_PREDICTORS and self.channels % 2:
            raise ValueError(f"model.channels {self.channels} is odd, and horfpn's gnConvs halve it")
        return self


class DetectionEvaluate(Section):
    """COCO's average precision on the validation split, every image once."""

    every_epochs: Count | None = Field(description="and after the last one; null: never")
    short_side_px: Count = Field(description="the image is resized to this shorter side")
    long_side_max_px: Count
    flip: bool = Field(description="test-time augmentation: boxes of the mirrored image join in")

    @model_validator(mode="after")
    def _sides_fit(self) -> DetectionEvaluate:
        check_sides(self.short_side_px, self.long_side_max_px)
        return self


class DetectConfig(RunConfig):
    """One run that learns to find objects."""

    task: Literal["detect"]
    data: DenseData
    augment: DetectionAugment
    model: DetectionModel
    evaluate: DetectionEvaluate

    @model_validator(mode="after")
    def _relations(self) -> DetectConfig:
        if self.checkpoint.best_metric not in (None, "box_ap", "mask_ap"):
            raise ValueError(
                f"checkpoint.best_metric {self.checkpoint.best_metric} is of another task: set box_ap, mask_ap or null"
            )
        if self.checkpoint.best_metric == "mask_ap" and not self.model.masks:
            raise ValueError("checkpoint.best_metric is mask_ap, and model.masks is false: set box_ap")
        # Where a rank's images have no object nothing is denoised, and it would not ask the others for that layer.
        if self.model.head in SET_PREDICTORS and self.train.zero_stage == 3:
            raise ValueError(f"train.zero_stage 3 does not go with model.head {self.model.head}: set 2 or less")
        return self
