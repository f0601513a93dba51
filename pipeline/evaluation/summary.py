"""From what is known of every image to figures: accuracy, calibration, classes, confusion, pairs. By torchmetrics where
it has the metric. A function of the images alone, in the order of their numbers: the same on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import binary_calibration_error, multiclass_confusion_matrix

from data_prep.labels.spaces import lemma
from pipeline.evaluation.wordnet import GROUPS, Group, Noun, groups_of

BINS = 15  # of confidence, as calibration is published
PAIRS = 20


@dataclass(frozen=True)
class Images:
    """All scored images by number in the split, ascending; the rest as in `Scored`, NumPy."""

    sample: np.ndarray
    label: np.ndarray
    place: np.ndarray
    tied: np.ndarray
    loss: np.ndarray
    top: np.ndarray
    probability: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        return self.top[:, 0]

    @property
    def confidence(self) -> np.ndarray:
        return self.probability[:, 0]

    @property
    def correct(self) -> np.ndarray:
        return self.place == 0

    @classmethod
    def of(cls, parts: Sequence[tuple[np.ndarray, ...]]) -> Images:
        """Of the batches of all ranks, in any order: (sample, *Scored) each."""
        columns = [np.concatenate(each) for each in zip(*parts, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        return cls(*(column[order] for column in columns))


def name_of(wnid: str) -> str:
    """The first word of a class, for people."""
    return lemma(wnid).split(",")[0]


def results(images: Images, real: bool) -> dict[str, float | None]:
    """`results` of evaluation.json, but for what the clock says."""
    losses = images.loss[np.isfinite(images.loss)]  # of a class that the head lacks it is infinite
    ece = binary_calibration_error(
        torch.from_numpy(images.confidence.copy()), torch.from_numpy(images.correct.astype(np.int64)), n_bins=BINS
    )
    return {
        "top1_percent": _percent(images.place < 1),
        "top5_percent": _percent(images.place < 5),
        "loss": None if real or not len(losses) else float(losses.mean(dtype=np.float64)),
        "tied_top1_percent": _percent(images.tied),
        # One NaN, and torchmetrics (1.9) takes all confidences for logits, of which it makes the sigmoid.
        "ece": float(ece) if np.isfinite(images.confidence).all() else None,
        "images": len(images.sample),
    }


def reliability(images: Images) -> list[dict[str, float | int | None]]:
    """Means of confidence and accuracy in equal bins of confidence, as torchmetrics bins for the ECE."""
    edges = np.linspace(0, 1, BINS + 1)
    of_bin = np.clip(np.searchsorted(edges.astype(np.float32), images.confidence, side="right") - 1, 0, BINS - 1)
    bins: list[dict[str, float | int | None]] = []
    for number in range(BINS):
        inside = of_bin == number
        confidence = accuracy = None
        if inside.any():
            confidence = finite(float(images.confidence[inside].mean(dtype=np.float64)))
            accuracy = float(images.correct[inside].mean())
        low, high = float(edges[number]), float(edges[number + 1])
        bins.append(
            {"low": low, "high": high, "images": int(inside.sum()), "confidence": confidence, "accuracy": accuracy}
        )
    return bins


def confusion(images: Images, synsets: Sequence[str], nouns: Mapping[str, Noun] | None) -> dict[str, Any] | None:
    """Images of each group against what they were taken for. Without WordNet, of classes, where they are few."""
    counts = np.bincount(images.label, minlength=len(synsets))
    if nouns is not None:
        groups = groups_of(synsets, counts, nouns)
    elif len(synsets) <= GROUPS:
        groups = [Group(wnid, name_of(wnid), [number]) for number, wnid in enumerate(synsets)]
    else:
        return None
    group_of = np.empty(len(synsets), np.int64)
    for number, group in enumerate(groups):
        group_of[group.classes] = number
    predicted, label = (torch.from_numpy(group_of[each]) for each in (images.predicted, images.label))
    if len(groups) > 1:
        matrix = multiclass_confusion_matrix(predicted, label, num_classes=len(groups)).tolist()
    else:  # torchmetrics takes one class for a mistake
        matrix = [[len(label)]]
    told = [
        {"wnid": each.wnid, "name": each.name, "classes": len(each.classes), "images": int(counts[each.classes].sum())}
        for each in groups
    ]
    return {"by": "class" if nouns is None else "wordnet", "groups": told, "matrix": matrix}


def per_class(images: Images, synsets: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of per_class.csv; None for what a class without images, or never predicted, has not."""
    classes = len(synsets)
    count = np.bincount(images.label, minlength=classes)
    predicted = np.bincount(images.predicted, minlength=classes)
    top1 = np.bincount(images.label, images.place < 1, classes)
    top5 = np.bincount(images.label, images.place < 5, classes)
    confidence = np.bincount(images.label, images.confidence, classes)
    right = np.bincount(images.predicted, images.correct, classes)
    worst: dict[int, tuple[int, int]] = {}
    for label, taken_for, times in reversed(_pairs(images)):  # the most frequent last, and of equal ones the first
        worst[label] = (taken_for, times)
    rows = []
    for number, wnid in enumerate(synsets):
        some, other = int(count[number]), worst.get(number)
        rows.append(
            {
                "class": number,
                "wnid": wnid,
                "name": name_of(wnid),
                "images": some,
                "top1_percent": 100 * top1[number] / some if some else None,
                "top5_percent": 100 * top5[number] / some if some else None,
                "confidence": confidence[number] / some if some else None,
                "predicted": int(predicted[number]),
                "precision_percent": 100 * right[number] / predicted[number] if predicted[number] else None,
                "confused_with_wnid": synsets[other[0]] if other else None,
                "confused_with_name": name_of(synsets[other[0]]) if other else None,
                "confused_images": other[1] if other else (0 if some else None),
            }
        )
    return rows


def worst_pairs(images: Images, synsets: Sequence[str]) -> list[tuple[int, int, dict[str, Any]]]:
    """(class, taken for, entry of `worst_pairs` without its pictures), worst first."""
    count = np.bincount(images.label, minlength=len(synsets))
    return [
        (
            label,
            other,
            {
                "wnid": synsets[label],
                "name": name_of(synsets[label]),
                "predicted_wnid": synsets[other],
                "predicted_name": name_of(synsets[other]),
                "images": times,
                "share_percent": 100 * times / int(count[label]),
            },
        )
        for label, other, times in _pairs(images)[:PAIRS]
    ]


def _pairs(images: Images) -> list[tuple[int, int, int]]:
    """(class, taken for, images), most images first; of equal ones that of the lower numbers."""
    wrong = ~images.correct & (images.predicted != images.label)
    pairs, times = np.unique(np.stack([images.label[wrong], images.predicted[wrong]], 1), axis=0, return_counts=True)
    return [(int(a), int(b), int(n)) for (a, b), n in sorted(zip(pairs, times, strict=True), key=lambda each: -each[1])]


def _percent(hits: np.ndarray) -> float:
    return 100 * int(hits.sum()) / len(hits)


def finite(value: float) -> float | None:
    """As JSON takes it; None for what is no number: a net whose weights are none has such logits."""
    return float(value) if math.isfinite(value) else None
