"""Classes joined to groups by the tree of WordNet 3.0, whose offsets ImageNet's ids are.

Read from its own `data.noun`, where it is installed: `apt-get install wordnet-base`, or NLTK's corpus.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.labels.spaces import LabelError

GROUPS = 24  # as many as a picture of the matrix can name


class Noun(NamedTuple):
    """A synset: its words, and the first of the synsets that it is a kind of (None for `entity`)."""

    words: str
    parent: str | None


class Group(NamedTuple):
    """Classes (numbers) under one node of the tree."""

    wnid: str
    name: str
    classes: list[int]


def find_wordnet() -> Path | None:
    """The `data.noun` of WordNet 3.0 of this machine: of WNSEARCHDIR, Debian's package, or NLTK's data."""
    nltk = [Path(part) / "corpora" / "wordnet" for part in os.environ.get("NLTK_DATA", "").split(os.pathsep) if part]
    search = os.environ.get("WNSEARCHDIR")
    places = [*([Path(search)] if search else []), Path("/usr/share/wordnet"), *nltk]
    places += [Path.home() / "nltk_data/corpora/wordnet", Path("/usr/share/nltk_data/corpora/wordnet")]
    return next((path / "data.noun" for path in places if (path / "data.noun").is_file()), None)


@lru_cache
def read_nouns(path: Path) -> dict[str, Noun]:
    """All synsets of a `data.noun`, by WordNet id. Raises LabelError where it is none."""
    nouns = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        if not line[:8].isdecimal():
            continue  # the licence, before all else
        try:
            offset, _, kind, count, *rest = line.split(" | ")[0].split()
            words = [word.replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
            pointers = rest[2 * int(count, 16) + 1 :]
            above = (
                to
                for sign, to, of in zip(pointers[::4], pointers[1::4], pointers[2::4], strict=False)
                if of == "n" and sign[0] == "@"
            )
            parent = next(above, None)
        except (ValueError, IndexError):
            raise LabelError(
                f"{path} is not WordNet's data.noun ({line[:40]!r}): apt-get install wordnet-base"
            ) from None
        if kind == "n":
            nouns[f"n{offset}"] = Noun(words[0], parent and f"n{parent}")
    if "n00001740" not in nouns:
        raise LabelError(f"{path} is not of WordNet 3.0, whose ids ImageNet has: n00001740 (entity) is not in it")
    return nouns


def groups_of(synsets: Sequence[str], images: np.ndarray, nouns: Mapping[str, Noun], most: int = GROUPS) -> list[Group]:
    """At most `most` groups that together hold every class once, in the tree's order.

    From the root on, the group with most images (by class, `images`) is split into its children, as long as there is
    room; those of its children that are small beside the whole stay together ("other ..."). A class that others are
    kinds of is then a child of itself.
    """
    paths = [_path(wnid, nouns) for wnid in synsets]
    little = images.sum() / (2 * most)
    done: list[Group] = []
    open_groups = [_narrowed(Group("", "", list(range(len(synsets)))), 0, paths)]
    while open_groups:
        open_groups.sort(key=lambda pair: (images[pair[0].classes].sum(), len(pair[0].classes)))
        group, depth = open_groups.pop()
        children: dict[str, list[int]] = {}
        for number in group.classes:
            children.setdefault(paths[number][min(depth, len(paths[number]) - 1)], []).append(number)
        small = {wnid for wnid, found in children.items() if images[found].sum() < little}
        small = small if 1 < len(small) < len(children) else set()
        parts = len(children) - len(small) + bool(small)
        named = group._replace(name=_name(group.wnid, nouns))
        if parts == 1 or len(done) + len(open_groups) + parts > most:
            done.append(named)
            continue
        if small:
            rest = sorted(number for wnid in small for number in children[wnid])
            done.append(Group(group.wnid, f"other {named.name}" if named.name else "other", rest))
        large = [Group(wnid, "", found) for wnid, found in children.items() if wnid not in small]
        open_groups += [_narrowed(each, depth + 1, paths) for each in large]
    return sorted(done, key=lambda group: min(paths[number] for number in group.classes))


def _path(wnid: str, nouns: Mapping[str, Noun]) -> list[str]:
    """From the root to the synset, itself the last; one that WordNet does not know stands alone."""
    path = [wnid]
    while (noun := nouns.get(path[0])) is not None and noun.parent is not None and noun.parent not in path:
        path.insert(0, noun.parent)
    return path


def _narrowed(group: Group, depth: int, paths: Sequence[Sequence[str]]) -> tuple[Group, int]:
    """The deepest node that still holds all of the group's classes, and the depth of its children."""
    own = [paths[number] for number in group.classes]
    while all(len(path) > depth for path in own) and len({path[depth] for path in own}) == 1:
        group, depth = group._replace(wnid=own[0][depth]), depth + 1
    return group, depth


def _name(wnid: str, nouns: Mapping[str, Noun]) -> str:
    noun = nouns.get(wnid)
    return noun.words if noun else wnid
