"""The configuration of a segmentation: its own sections data, augment, model and evaluate."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from data_prep.storage import is_url
from pipeline.config.fields import Count, DatasetPath, Fraction, Positive, Section
from pipeline.config.run import RunConfig
from pipeline.config.sections import Backbone

STRIDE_PX = 32  # HorNet's total stride
MASK2FORMER, GROUPS = "mask2former", 32  # a head; the groups of channels that its norms have
_Scales = Annotated[tuple[Positive, ...], Field(min_length=1)]


class DenseData(Section):
    """Which shards, read how."""

    path: DatasetPath = Field(description="folder made by `python -m data_prep shard-dense`")
    resolution: Count = Field(description="side of the training crop, pixels; a multiple of 32")
    workers_per_rank: Annotated[int, Field(ge=0)] = Field(description="processes that decode and augment; 0: the rank")
    shuffle_lanes: Count = Field(description="see pipeline/data/order.py")
    shuffle_window_shards: Count = Field(description="shards that a lane is shuffled over at a time")

    @field_validator("path")
    @classmethod
    def _is_local(cls, path: str) -> str:
        if is_url(path):
            raise ValueError(f"data.path {path}: sets with masks are read from local folders: copy it there")
        return path

    @field_validator("resolution")
    @classmethod
    def _fits_the_stride(cls, side: int) -> int:
        if side % STRIDE_PX:
            nearest = max(STRIDE_PX, round(side / STRIDE_PX) * STRIDE_PX)
            raise ValueError(
                f"data.resolution {side} is not a multiple of {STRIDE_PX}, HorNet's total stride; nearest: {nearest}"
            )
        return side

    # What those ask who know sets of images of classes: a dense set is a local folder, read by seeks.
    reader: ClassVar[str] = "indexed"
    is_remote: ClassVar[bool] = False
    stream_cache: ClassVar[bool] = False
    bad_samples_max: ClassVar[int] = 0

    @property
    def how_to_check(self) -> str:
        """What to do where images or shards are bad, for messages."""
        return f"to check: `python -m data_prep verify {self.path}`"


class DenseAugment(Section):
    """Training augmentation of an image and its mask together: resized, cropped, mirrored; then colours."""

    short_side_px: Count = Field(description="the image is resized to this shorter side, times a scale")
    long_side_max_px: Count = Field(description="but its longer side, before the scale, is no longer than this")
    scale_min: Positive
    scale_max: Positive
    class_share_max: Annotated[float, Field(gt=0, le=1)] = Field(
        description="crops in which one class has a larger share are drawn anew, ten times; 1: any crop"
    )
    horizontal_flip: Fraction
    photometric: Fraction = Field(
        description="brightness, contrast, saturation and hue, each with this probability; 0: none"
    )

    @model_validator(mode="after")
    def _sides_fit(self) -> DenseAugment:
        if self.scale_min > self.scale_max:
            raise ValueError(f"augment.scale_min {self.scale_min:g} is above augment.scale_max {self.scale_max:g}")
        if self.short_side_px > self.long_side_max_px:
            raise ValueError(
                f"augment.short_side_px {self.short_side_px} is above augment.long_side_max_px {self.long_side_max_px}"
            )
        return self


class SegmentationModel(Backbone):
    """A backbone of timm's registry, and the head on its four maps."""

    head: Literal["uper", "gn-uper", "mask2former"] = Field(
        description="uper: UPerNet's, with 3x3 convolutions; gn-uper: with gnConv in their places; mask2former: "
        "queries with a class and a mask each"
    )
    head_channels: Count
    auxiliary_weight: Annotated[float, Field(ge=0)] = Field(
        description="of the loss of a second, small head on the third map; 0: none"
    )
    compile: ClassVar[bool] = False
    cuda_graphs: ClassVar[bool] = False

    @model_validator(mode="after")
    def _suits_the_head(self) -> SegmentationModel:
        if self.head == MASK2FORMER and self.auxiliary_weight:
            raise ValueError(
                f"model.auxiliary_weight {self.auxiliary_weight:g} is of the uper heads, and {MASK2FORMER} learns from "
                "each of its layers: set it to 0"
            )
        if self.head == MASK2FORMER and self.head_channels % GROUPS:
            raise ValueError(
                f"model.head_channels {self.head_channels} is not a multiple of {GROUPS}, the groups of "
                f"{MASK2FORMER}'s norms"
            )
        if self.head == "gn-uper" and self.head_channels % 2:
            raise ValueError(f"model.head_channels {self.head_channels} is odd, and gn-uper's gnConvs halve it")
        return self


def check_sides(short_side_px: int, long_side_max_px: int) -> None:
    """Of the images of an evaluation. Raises ValueError."""
    if short_side_px > long_side_max_px:
        raise ValueError(
            f"evaluate.short_side_px {short_side_px} is above evaluate.long_side_max_px {long_side_max_px}"
        )


class DenseEvaluate(Section):
    """Mean intersection over union on the validation split, every image once, at its own size."""

    every_epochs: Count | None = Field(description="and after the last one; null: never")
    mode: Literal["whole", "slide"] = Field(
        description="whole: the image at once; slide: windows of data.resolution, whose overlaps are averaged"
    )
    short_side_px: Count = Field(description="the image is resized to this shorter side; the logits to its own size")
    long_side_max_px: Count
    stride_px: Count = Field(description="with slide: from window to window")
    scales: _Scales = Field(description="test-time augmentation: probabilities are averaged over these; [1.0]: none")
    flip: bool = Field(description="test-time augmentation: and over the mirrored image")

    @model_validator(mode="after")
    def _sides_fit(self) -> DenseEvaluate:
        check_sides(self.short_side_px, self.long_side_max_px)
        return self


class SegmentConfig(RunConfig):
    """One run that learns to segment."""

    task: Literal["segment"]
    data: DenseData
    augment: DenseAugment
    model: SegmentationModel
    evaluate: DenseEvaluate

    @model_validator(mode="after")
    def _relations(self) -> SegmentConfig:
        if self.evaluate.mode == "slide" and self.evaluate.stride_px > self.data.resolution:
            raise ValueError(
                f"evaluate.stride_px {self.evaluate.stride_px} is above data.resolution {self.data.resolution}: there "
                f"would be pixels in no window"
            )
        if self.checkpoint.best_metric not in (None, "miou", "val_loss"):
            raise ValueError(
                f"checkpoint.best_metric {self.checkpoint.best_metric} is of another task: set miou, val_loss or null"
            )
        return self
