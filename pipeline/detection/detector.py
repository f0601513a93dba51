"""From the configuration's section `model` to a detector."""

from __future__ import annotations

from pipeline.config.detect import DetectionModel
from pipeline.detection.base import Detector
from pipeline.detection.regions import RegionDetector


def build_detector(model: DetectionModel, num_classes: int, resolution: int) -> Detector:
    """The detector of `model.head`, for square crops of `resolution` pixels; see `Detector`."""
    return RegionDetector(model, num_classes, resolution)
