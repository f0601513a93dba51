"""Starting from somebody's weights: the head mapped by WordNet id, global filters resized to the new resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from data_prep.labels.spaces import KNOWN_SPACES, LabelMap, label_space, lemma, map_labels
from pipeline.checkpoints.choice import Source
from pipeline.checkpoints.files import CheckpointError
from pipeline.checkpoints.weights import HEAD, Tensors, read_weights
from pipeline.config.run import RunConfig
from pipeline.models.build import build_model
from pipeline.ops.global_filter import resize_global_filters


class Fitted(NamedTuple):
    """Weights that fit a model: of its body by name, and head rows for its classes `found`, (classes,) bool; WordNet
    ids of the others, which keep fresh rows.
    """

    body: Tensors
    head: Tensors
    found: torch.Tensor
    report: str
    unmatched: list[str]


def load_into(model: nn.Module, source: Source, synsets: Sequence[str]) -> Fitted:
    """Copy the source's weights into `model`, whose head has one output for each of `synsets`; returns what was done.

    Raises as `fit`; then the model is as it was.
    """
    fitted = fit(model, source, synsets)
    own = model.state_dict()
    for name, rows in fitted.head.items():
        own[name][fitted.found] = rows
    model.load_state_dict(own | fitted.body)
    return fitted


def check_fit(config: RunConfig, source: Source, synsets: Sequence[str]) -> None:
    """Raise what `load_into` would, without the time and memory that building the model takes."""
    with torch.device("meta"):
        model = build_model(config.model, len(synsets), config.data.resolution)
    fit(model, source, synsets)


def fit(model: nn.Module, source: Source, synsets: Sequence[str]) -> Fitted:
    """Read the source's weights and fit them to `model`, which may be on torch's device "meta" and is not changed.

    The head's rows go to the class of the same WordNet id; classes the source lacks keep their fresh rows. Raises
    CheckpointError where the file is not one of weights, or any tensor but the head's is missing, unknown, or of
    another shape.
    """
    own = model.state_dict()
    body = {name: value for name, value in own.items() if name not in HEAD}
    weights, which = read_weights(source.weights, source.which, body)
    head = {name: weights.pop(name) for name in HEAD if name in weights}
    try:
        weights = resize_global_filters(weights, model)
    except ValueError as error:
        raise CheckpointError(f"{source.weights} does not fit the model: {error}") from None
    _check_body(source, weights, body)
    mapping, report = None, "head left fresh (init.label_space is none)"
    if source.synsets is not None or source.by_size:
        mapping, space = _map_head(source, head, own["head.weight"].shape[1], synsets)
        report = _head_report(mapping, synsets, space)
    index = torch.from_numpy(mapping.source_index) if mapping else torch.full((len(synsets),), -1)
    found = index >= 0
    rows = {name: value[index[found]] for name, value in head.items()} if mapping else {}
    origin = f"weights from {source.weights}{f' ({which})' if which else ''}"
    unmatched = [wnid for wnid, known in zip(synsets, found.tolist(), strict=True) if not known]
    return Fitted(weights, rows, found, f"{origin}; {report}", unmatched)


def _check_body(source: Source, weights: Tensors, body: Tensors) -> None:
    missing = [name for name in body if name not in weights]
    unknown = [name for name in weights if name not in body]
    other = [
        f"{name} is {tuple(weights[name].shape)}, the model's {tuple(value.shape)}"
        for name, value in body.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if len(missing) == len(body):
        raise CheckpointError(
            f"{source.weights} has none of the model's weights, it has {', '.join(list(weights)[:2]) or 'nothing else'}"
            f": it is of another kind of model"
        )
    faults = [f"lacks {name}" for name in missing]
    faults += [f"has {name}, which the model lacks" for name in unknown]
    faults += other
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise CheckpointError(
            f"{source.weights} does not fit the model: {'; '.join(faults[:3])}{more}: set model.name to what it is of"
        )


def _map_head(source: Source, head: Tensors, width: int, synsets: Sequence[str]) -> tuple[LabelMap, str]:
    """Also the name of the label space, where the number of the head's rows has told it."""
    missing = [name for name in HEAD if name not in head]
    if missing:
        has = f"{', '.join(head)} without {missing[0]}" if head else "no head (head.weight, head.bias)"
        raise CheckpointError(f"{source.weights} has {has}: set init.label_space=none, which trains a fresh head")
    weight, bias = (head[name] for name in HEAD)
    if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{source.weights}: head.weight is {tuple(weight.shape)}, head.bias {tuple(bias.shape)}; the model's head "
            f"takes (classes, {width}) and (classes,): set model.name to what it is of, or init.label_space=none"
        )
    spaces = [name for name, space in KNOWN_SPACES.items() if space.classes == len(weight)]
    hint = f"={spaces[0]}" if len(spaces) == 1 else " to a text file with its WordNet ids, one a line"
    if source.synsets is None:
        if len(spaces) != 1 or KNOWN_SPACES[spaces[0]].timm_file is None:
            which = f", which {' and '.join(spaces)} have" if spaces else ", as no known label space has"
            raise CheckpointError(
                f"{source.weights} does not say which classes its head has, and has {len(weight):,} of them{which}: "
                f"set init.label_space{'' if len(spaces) > 1 else hint}"
                + (f" to {' or '.join(spaces)}" if len(spaces) > 1 else "")
                + ", or to none (a fresh head)"
            )
        return map_labels(label_space(spaces[0]), synsets), spaces[0]
    if len(weight) != len(source.synsets):
        raise CheckpointError(
            f"{source.weights} has a head of {len(weight)} classes, its label space {len(source.synsets)}: set "
            f"init.label_space{hint}"
        )
    return map_labels(source.synsets, synsets), ""


def _head_report(mapping: LabelMap, synsets: Sequence[str], space: str) -> str:
    report = f"head: {len(mapping.matched)} of {len(synsets)} classes from the source by WordNet id"
    report += f" ({space}, by its size)" if space else ""
    if mapping.unmatched:
        words = ", ".join(f"{wnid} ({lemma(wnid).split(',')[0]})" for wnid in mapping.unmatched[:5])
        report += f", {len(mapping.unmatched)} fresh: {words}{', ...' if len(mapping.unmatched) > 5 else ''}"
    return report
