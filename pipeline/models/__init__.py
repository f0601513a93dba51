"""The HorNet family; importing this package registers it with timm."""

from pipeline.models import variants as variants
