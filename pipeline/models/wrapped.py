"""A HorNet inside a model of another library: found, loaded, and told apart from the heads around it.

Under which name it stands is the library's: `model.pixel_level_module.encoder._backbone.model.` in transformers'
Mask2Former, `backbone._backbone.model.` in its UPerNet, `encoder.model.model.` in segmentation_models_pytorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from pipeline.models.hornet import HorNet
from pipeline.models.layer_decay import layer_within
from pipeline.ops.global_filter import resize_global_filters


def hornet_within(model: nn.Module) -> tuple[str, HorNet]:
    """(prefix of its parameters' names, the net).

    Raises:
        ValueError: there is none, or there are several.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, HorNet)]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ValueError(f"{type(model).__name__} should hold one HorNet, it holds {names}: pass the one that is meant")
    name, net = found[0]
    return f"{name}." if name else "", net


def layer_matcher(model: nn.Module, coarse: bool = False) -> Callable[[str], int]:
    """Layer of each parameter of `model` by its name, for layer-wise learning-rate decay.

    Those of the net have its own (see `layer_decay`), all others that of its head, the last: the full rate. As a method
    `group_matcher` of `model` it is what `timm.optim.param_groups_layer_decay` asks for.
    """
    return partial(layer_within, prefix=hornet_within(model)[0], coarse=coarse)


def load_backbone(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a HorNet's state into the one inside `model`, with filters resized to it; heads stay as they are.

    Raises:
        ValueError: weights are missing, but for those of a classifier.
        RuntimeError: other shapes than the net's.
    """
    prefix, net = hornet_within(model)
    own = net.state_dict()
    state = {name: tensor for name, tensor in state_dict.items() if name in own and not name.startswith("head.")}
    missing = [name for name in own if name not in state and not name.startswith(("norm.", "head."))]
    if missing:
        raise ValueError(
            f"{len(missing)} weights of {prefix or 'the net'} are not in the state, {missing[0]} among them: "
            "pass the state dict of a HorNet, names as published"
        )
    net.load_state_dict({**own, **resize_global_filters(state, net)})
