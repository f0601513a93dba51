"""From the configuration's section `model` to a detector."""

from __future__ import annotations

from pipeline.config.detect import SET_PREDICTORS, DetectionModel
from pipeline.detection.base import Detector
from pipeline.detection.regions import RegionDetector
from pipeline.detection.set_prediction import SetDetector


def build_detector(model: DetectionModel, num_classes: int, resolution: int) -> Detector:
    """The detector of `model.head`, for square crops of `resolution` pixels; see `Detector`. Raises ConfigError."""
    make = SetDetector if model.head in SET_PREDICTORS else RegionDetector
    return make(model, num_classes, resolution)
