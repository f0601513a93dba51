"""Label spaces keyed by WordNet id, and the map from one to another.

A class number means nothing by itself: "ImageNet-22K" is 21,841, 19,167, 10,450 or 10,459 classes depending
on whom you ask. Here a label space is the list of its WordNet ids in class order, and a map is always made
through them. timm's lists are the source; they are read as files, so that no torch is imported for a text
file.
"""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_prep.manifest import DataPrepError


class LabelError(DataPrepError):
    """A label space that is not one (duplicates), or whose source is missing."""


@dataclass(frozen=True, eq=False)
class LabelMap:
    """For each target class, where it is in the source.

    source_index (number of target classes,) int64: the class number in the source, or -1 where it has none;
    matched and unmatched: WordNet ids of the target, in target order.
    """

    source_index: np.ndarray
    matched: list[str]
    unmatched: list[str]


def map_labels(source: Sequence[str], target: Sequence[str]) -> LabelMap:
    """Map every class of `target` to its number in `source`, by WordNet id.

    Raises LabelError when either lists an id twice: the map would be ambiguous.
    """
    for name, space in (("source", source), ("target", target)):
        if len(set(space)) != len(space):
            twice = [synset for synset, times in Counter(space).items() if times > 1]
            raise LabelError(f"the {name} label space lists {len(twice)} WordNet id(s) twice, first {twice[0]}")
    position = {synset: index for index, synset in enumerate(source)}
    return LabelMap(
        source_index=np.array([position.get(synset, -1) for synset in target], dtype=np.int64),
        matched=[synset for synset in target if synset in position],
        unmatched=[synset for synset in target if synset not in position],
    )


@lru_cache
def _timm_info_lines(file_name: str) -> tuple[str, ...]:
    # find_spec locates timm without importing it; importing it would import torch, which takes seconds.
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.origin:
        raise LabelError("timm is not installed, and its lists of WordNet ids are needed: run `make setup`")
    path = Path(spec.origin).parent / "data" / "_info" / file_name
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except FileNotFoundError:
        raise LabelError(f"this timm has no {path}: install a timm named in constraints.txt") from None


def imagenet_1k_synsets() -> list[str]:
    """The 1,000 classes of ImageNet-1K in their usual order (sorted by WordNet id)."""
    return [line.strip() for line in _timm_info_lines("imagenet_synsets.txt") if line.strip()]


def winter21_p_synsets() -> list[str]:
    """The 10,450 classes of ImageNet-21K-P (winter 2021 release), sorted by WordNet id."""
    return sorted(line.strip() for line in _timm_info_lines("imagenet21k_miil_w21_synsets.txt") if line.strip())


def published_hornet_22k_synsets() -> list[str]:
    """The 10,459 classes of the head of the published HorNet checkpoints that are called "22K".

    winter21-P in sorted order, then the nine ImageNet-1K classes it lacks, in ImageNet-1K order.
    """
    base = winter21_p_synsets()
    return base + map_labels(base, imagenet_1k_synsets()).unmatched


@lru_cache
def _lemmas() -> dict[str, str]:
    return dict(line.rstrip("\n").split("\t", 1) for line in _timm_info_lines("imagenet_synset_to_lemma.txt") if line)


def lemma(wnid: str) -> str:
    """The words of a WordNet id ("tench, Tinca tinca"), or the id itself where timm knows none."""
    return _lemmas().get(wnid, wnid)
