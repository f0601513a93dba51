"""Model families; importing this package registers them with timm."""

from pipeline.models import variants as variants
from pipeline.models.fuse import fuse_for_inference
from pipeline.models.hornet import HorNet
from pipeline.ops.global_filter import resize_global_filters

__all__ = ["HorNet", "fuse_for_inference", "resize_global_filters"]
