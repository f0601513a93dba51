"""From the configuration's section `model` to a net: the one file of the models that knows of configurations."""

from __future__ import annotations

from typing import Any

import timm

from pipeline.config.sections import Backbone
from pipeline.models.hornet import HorNet


def build_model(model: Backbone, num_classes: int, resolution: int) -> HorNet:
    """The model of `model.name` for square inputs of `resolution` pixels.

    Global filters are made at the size that the resolution asks for, so none is resized at each step.
    """
    filters: dict[str, Any] = {"img_size": resolution} if "_gf" in model.name else {}
    net = timm.create_model(
        model.name,
        num_classes=num_classes,
        drop_path_rate=model.drop_path_rate,
        layer_scale_init=model.layer_scale_init,
        **filters,
    )
    assert isinstance(net, HorNet)
    net.set_checkpointing(model.checkpointing)
    return net
