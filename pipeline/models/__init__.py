"""Model families; importing this package registers them with timm."""

from pipeline.models import variants as variants
from pipeline.models.hornet import HorNet
from pipeline.ops.gnconv import resize_global_filters

__all__ = ["HorNet", "resize_global_filters"]
