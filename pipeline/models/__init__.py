"""The HorNet family, and nets of others with gnConv; importing this package registers them with timm."""

from pipeline.models import plug_in as plug_in
from pipeline.models import variants as variants
