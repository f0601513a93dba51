"""Label spaces keyed by WordNet id, and the map from one to another.

A class number means nothing by itself: "ImageNet-22K" is 21,841, 19,167, 11,221, 10,450 or 10,459 classes
depending on whom you ask. Here a label space is the list of its WordNet ids in class order, and a map is always
made through them. timm's lists are the source; they are read as files, so that no torch is imported for a text
file, and are never copied: what this timm has is what counts, checked against the known numbers of classes.

Class order: every space is sorted by WordNet id, as `data_prep shard` numbers the classes of a data set, but for
hornet-22k: winter21-p sorted, then the nine classes of ImageNet-1K that it lacks, in ImageNet-1K order.
"""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_prep.manifest import MANIFEST_NAME, SYNSET_PATTERN, Manifest
from data_prep.storage import DataPrepError

# Of ImageNet-1K, and not of fall 2011. Swin Transformer's map22kto1k.txt has 5564 in its place, which is n03013580
# ("chemise, shimmy, shift, slip, teddy"); InternImage's differs there too (OpenGVLab/InternImage, issue 278).
TEDDY_BEAR = "n04399382"


class LabelError(DataPrepError):
    """A label space that is not one (duplicates), is not known, or whose source is missing or not as expected."""


@dataclass(frozen=True)
class LabelSpace:
    """A space with a name. `timm_file` holds its WordNet ids ('': hornet-22k is put together from two others;
    None: no list is published in timm, it is read from the data)."""

    classes: int
    timm_file: str | None
    what: str


KNOWN_SPACES = {
    "fall11": LabelSpace(21_841, "imagenet22k_synsets.txt", "ImageNet-22K (also called 21K), fall 2011 release, whole"),
    "winter21": LabelSpace(19_167, None, "ImageNet-22K, winter 2021 release, whole: read from your data"),
    "fall11-p": LabelSpace(11_221, "imagenet21k_miil_synsets.txt", "ImageNet-21K-P of the fall 2011 release"),
    "winter21-p": LabelSpace(
        10_450,
        "imagenet21k_miil_w21_synsets.txt",
        "ImageNet-21K-P of the winter 2021 release: at least 500 images a class",
    ),
    "hornet-22k": LabelSpace(
        10_459, "", 'head of the published HorNet "22K" checkpoints: winter21-p and nine more of imagenet-1k'
    ),
    "imagenet-12k": LabelSpace(11_821, "imagenet12k_synsets.txt", "timm's ImageNet-12K subset of fall11"),
    "imagenet-1k": LabelSpace(1_000, "imagenet_synsets.txt", "ILSVRC 2012"),
    "imagenet-a": LabelSpace(200, "imagenet_a_synsets.txt", "ImageNet-A: 200 classes of imagenet-1k"),
    "imagenet-r": LabelSpace(200, "imagenet_r_synsets.txt", "ImageNet-R: 200 other ones"),
}


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


def _timm_info_path(file_name: str) -> Path:
    # find_spec locates timm without importing it; importing it would import torch, which takes seconds.
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.origin:
        raise LabelError("timm is not installed, and its lists of WordNet ids are needed: run `make setup`")
    return Path(spec.origin).parent / "data" / "_info" / file_name


@lru_cache
def _timm_info_lines(file_name: str) -> tuple[str, ...]:
    path = _timm_info_path(file_name)
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except FileNotFoundError:
        raise LabelError(f"this timm has no {path}: install a timm named in constraints.txt") from None


@lru_cache
def _known_space(name: str) -> tuple[str, ...]:
    space = KNOWN_SPACES[name]
    if space.timm_file is None:
        raise LabelError(
            f"{name} ({space.classes:,} classes) has no list in timm: give a data set folder built from that release, "
            "or a text file with one WordNet id per line"
        )
    if space.timm_file == "":
        base = _known_space("winter21-p")
        synsets = base + tuple(map_labels(base, _known_space("imagenet-1k")).unmatched)
    else:
        synsets = tuple(sorted(line.strip() for line in _timm_info_lines(space.timm_file) if line.strip()))
    if len(set(synsets)) != space.classes:
        where = f"{_timm_info_path(space.timm_file)} lists" if space.timm_file else "winter21-p and imagenet-1k make"
        raise LabelError(
            f"{where} {len(set(synsets)):,} classes, {name} has {space.classes:,}: install a timm named in "
            "constraints.txt"
        )
    return synsets


def label_space(name_or_path: str | Path) -> list[str]:
    """The WordNet ids, in class order, of a known space, a data set folder (local or URL), or a text file.

    A text file holds one WordNet id per line, in class order; empty lines and those that begin with # do not count.
    Raises LabelError for what is none of these, and ManifestError for a folder without a valid dataset.json.
    """
    name = str(name_or_path)
    if name in KNOWN_SPACES:
        return list(_known_space(name))
    path = Path(name)
    if "://" in name:
        return Manifest.load(name).synsets
    if path.is_file() and path.name != MANIFEST_NAME:
        return _read_list(path)
    if not path.exists():
        raise LabelError(
            f"{name} is no data set folder, no text file, and none of the known label spaces: {', '.join(KNOWN_SPACES)}"
        )
    return Manifest.load(path.parent if path.is_file() else path).synsets


def _read_list(path: Path) -> list[str]:
    synsets = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise LabelError(f"{path} is not a text file: give one WordNet id per line, or a data set folder") from None
    for number, line in enumerate(lines, start=1):
        synset = line.strip()
        if synset and not synset.startswith("#"):
            if not SYNSET_PATTERN.fullmatch(synset):
                raise LabelError(f"{path} line {number}: {synset[:40]!r} is not a WordNet id (n and 8 digits)")
            synsets.append(synset)
    if not synsets:
        raise LabelError(f"{path} lists no WordNet id: give one per line")
    return synsets


def imagenet_1k_synsets() -> list[str]:
    """The 1,000 classes of ImageNet-1K in their usual order (sorted by WordNet id)."""
    return label_space("imagenet-1k")


def winter21_p_synsets() -> list[str]:
    """The 10,450 classes of ImageNet-21K-P (winter 2021 release), sorted by WordNet id."""
    return label_space("winter21-p")


def published_hornet_22k_synsets() -> list[str]:
    """The 10,459 classes of the head of the published HorNet checkpoints that are called "22K".

    winter21-P in sorted order, then the nine ImageNet-1K classes it lacks, in ImageNet-1K order.
    """
    return label_space("hornet-22k")


@lru_cache
def _lemmas() -> dict[str, str]:
    return dict(line.rstrip("\n").split("\t", 1) for line in _timm_info_lines("imagenet_synset_to_lemma.txt") if line)


def lemma(wnid: str) -> str:
    """The words of a WordNet id ("tench, Tinca tinca"), or the id itself where timm knows none."""
    return _lemmas().get(wnid, wnid)
