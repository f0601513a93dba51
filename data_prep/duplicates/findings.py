"""What `duplicates` finds: pairs of images, and the rows that name them."""

from dataclasses import dataclass, field
from typing import NamedTuple

from data_prep.duplicates.hashing import HashedImages, ImageRow

KINDS = ("exact", "near", "mirrored")


class Pair(NamedTuple):
    """An image of train (`a`, to leave out) and the one it is a duplicate of (`b`, kept); numbers of images."""

    a: int
    b: int
    distance: int
    kind: str


@dataclass
class Findings:
    """What was found; `flat` are images without content, compared by their bytes alone."""

    train: HashedImages
    against: HashedImages | None
    max_distance: int
    within_pairs: list[Pair] = field(default_factory=list)
    against_pairs: list[Pair] = field(default_factory=list)
    train_rows: dict[int, ImageRow] = field(default_factory=dict)
    against_rows: dict[int, ImageRow] = field(default_factory=dict)
    searched_within: bool = False

    def scopes(self) -> list[tuple[str, list[Pair], HashedImages, dict[int, ImageRow]]]:
        """(name, pairs, the images of side b, their rows) of each search that was made."""
        found = []
        if self.against is not None:
            found.append(("against", self.against_pairs, self.against, self.against_rows))
        if self.searched_within:
            found.append(("within", self.within_pairs, self.train, self.train_rows))
        return found

    def excluded(self) -> set[tuple[str, str]]:
        """(wnid, name) of every image of train to leave out."""
        numbers = {pair.a for pair in (*self.within_pairs, *self.against_pairs)}
        return {(self.train_rows[number].wnid, self.train_rows[number].name) for number in numbers}
