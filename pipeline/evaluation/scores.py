"""What logits say of an image: where its class stands among all, and how ties count. The same for every evaluation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TOP = 5  # classes that are kept of each image


def places(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the label: (B, C) logits and (B,) labels -> (B,), 0 for a top-1 hit.

    Of equal logits the class of the lower number stands first, as NumPy's argmax and ONNX's ArgMax have it; `topk`
    leaves it to the device. A label whose logit is NaN, or -inf (the head lacks the class), stands last, and NaN before
    any label.
    """
    own = logits.gather(1, labels[:, None])
    number = torch.arange(logits.shape[1], device=logits.device)
    before = ~(logits <= own) | ((logits == own) & (number < labels[:, None]))
    return before.sum(1).masked_fill(own[:, 0] == -torch.inf, logits.shape[1])


def tied(logits: Tensor) -> Tensor:
    """(B,) bool: whether two classes or more share the highest logit, so that their order alone says which is first."""
    return (logits == logits.amax(1, keepdim=True)).sum(1) > 1


class Scored(NamedTuple):
    """Of each image of a batch, on the CPU. label: where an image has several, the one that stands first."""

    label: Tensor  # (B,) int64
    place: Tensor  # (B,) int64
    tied: Tensor  # (B,) bool
    loss: Tensor  # (B,) float32, cross-entropy
    top: Tensor  # (B, TOP or C) int64, the likeliest classes
    probability: Tensor  # of `top`, float32


def score(logits: Tensor, labels: Tensor) -> Scored:
    """`labels`: (B,), or (B, L) where images have several, -1 in the places that are left."""
    logits = logits.float()
    if labels.ndim == 1:
        label, place = labels, places(logits, labels)
    else:
        each = torch.stack([places(logits, column.clamp(min=0)) for column in labels.unbind(1)], 1)  # (B, L)
        best = each.masked_fill(labels < 0, logits.shape[1] + 1).argmin(1, keepdim=True)
        label, place = labels.gather(1, best)[:, 0], each.gather(1, best)[:, 0]
    # Stable: equal ones stay in the order of their numbers, as `places` counts them.
    top = logits.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
    probability = logits.softmax(1).gather(1, top)
    loss = F.cross_entropy(logits, label, reduction="none")
    return Scored(*(value.cpu() for value in (label, place, tied(logits), loss, top, probability)))
