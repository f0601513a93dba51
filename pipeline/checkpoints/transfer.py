"""Starting from somebody's weights: the head mapped by WordNet id, global filters resized to the new resolution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from data_prep.labels.spaces import lemma, map_labels
from pipeline.checkpoints.choice import Source
from pipeline.checkpoints.files import CheckpointError
from pipeline.checkpoints.state import read_tensors
from pipeline.ops.global_filter import resize_global_filters

HEAD = ("head.weight", "head.bias")


def load_into(model: nn.Module, source: Source, synsets: Sequence[str]) -> str:
    """Copy the source's weights into `model`, whose head has one output for each of `synsets`; returns what was done.

    The head's rows go to the class of the same WordNet id; classes the source lacks keep their fresh rows. Raises
    CheckpointError where any other tensor is missing, unknown, or of another shape.
    """
    weights = _read_weights(source.weights)
    own = model.state_dict()
    head = {name: weights.pop(name) for name in HEAD if name in weights}
    weights = resize_global_filters(weights, model)
    body = {name: value for name, value in own.items() if name not in HEAD}
    faults = [f"lacks {name}" for name in body if name not in weights]
    faults += [f"has {name}, which the model lacks" for name in weights if name not in body]
    faults += [
        f"{name} is {tuple(weights[name].shape)}, the model's {tuple(value.shape)}"
        for name, value in body.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise CheckpointError(f"{source.weights} does not fit the model: {'; '.join(faults[:3])}{more}")
    report = "head left fresh (init.label_space is none)"
    if source.synsets is not None and head:
        rows = len(head["head.weight"])
        if rows != len(source.synsets):
            raise CheckpointError(
                f"{source.weights} has a head of {rows} classes, its label space {len(source.synsets)}: "
                f"set init.label_space"
            )
        mapping = map_labels(source.synsets, synsets)
        index = torch.from_numpy(mapping.source_index)
        found = index >= 0
        for name, value in head.items():
            own[name][found] = value[index[found]]
        report = f"head: {len(mapping.matched)} of {len(synsets)} classes from the source by WordNet id"
        if mapping.unmatched:
            words = ", ".join(f"{wnid} ({lemma(wnid).split(',')[0]})" for wnid in mapping.unmatched[:5])
            report += f", {len(mapping.unmatched)} fresh: {words}{', ...' if len(mapping.unmatched) > 5 else ''}"
    model.load_state_dict(own | weights)
    return f"weights from {source.weights}; {report}"


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for files that are not its own
        raise CheckpointError(f"{path} is neither safetensors nor a torch checkpoint of weights: {error}") from None
    return content.get("model", content)  # the published files hold {"model": state dict}
