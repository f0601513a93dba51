"""What is no source of images, or has a split without a class: refused early, or at its end."""

from typing import Any, NoReturn

from data_prep.sources.items import Stray
from data_prep.sources.layout import INTENDED, lookalikes, offer_to_rename
from data_prep.sources.streams import SourceError
from data_prep.sources.val_labels import LABEL_FORMS

MAX_STRAYS_BEFORE_CLASS = 20  # an archive of something else is noticed here, not after a terabyte


class Refusal:
    """Watches what is met of a source, split by split. `wanted`: what it must hold; `split`: the one it is for."""

    def __init__(self, path: str, wanted: str, split: str):
        self._path, self._wanted, self._split = path, wanted, split
        self._strays: dict[str, list[str]] = {}
        self._fine: set[str] = set()
        self._damaged = False

    def see(self, split: str, wnid: str, stray: Stray | None, damaged: bool) -> None:
        """A class (also one without images), a file that is left out, or damage. Raises SourceError."""
        # A damaged archive is none of something else; its damage is told.
        self._damaged |= damaged
        if wnid:
            self._fine.add(split)
        if stray is None or split in self._fine or self._damaged:
            return
        strays = self._strays.setdefault(split, [])
        if len(strays) <= MAX_STRAYS_BEFORE_CLASS and not (stray.reason in INTENDED and strays):
            strays.append(stray.name)
        if len(strays) > MAX_STRAYS_BEFORE_CLASS and not lookalikes([stray.name]):
            self._refuse(split)

    def state(self) -> dict[str, Any]:
        """What was seen, for `restore`, as JSON holds it."""
        return {"strays": self._strays, "fine": sorted(self._fine), "damaged": self._damaged}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._strays, self._fine, self._damaged = state["strays"], set(state["fine"]), state["damaged"]

    def at_end(self) -> None:
        """Raises SourceError where a split has files, but no class, and where there is nothing at all."""
        if self._damaged:
            return
        for split in self._strays:
            if split not in self._fine and (self._fine or split == "val"):
                refuse_split(self._path, split, self._strays[split])
        if not self._fine:
            self._refuse(self._split)

    def _refuse(self, split: str) -> NoReturn:
        strays = self._strays.get(split) or [name for names in self._strays.values() for name in names]
        if split == "val" != self._split:
            refuse_split(self._path, split, strays)
        if strays:
            offer = offer_to_rename(lookalikes(strays))
            raise SourceError(
                f"{self._path} holds no {self._wanted}; it holds {strays[0]}{f': {offer}' if offer else ''}"
            )
        raise SourceError(f"{self._path} is empty: no images found")


def refuse_split(path: str, split: str, strays: list[str]) -> NoReturn:
    """Raise SourceError for a split none of whose files belongs to a class, or that has none."""
    offer = offer_to_rename(lookalikes(strays))
    if not offer and split == "val":
        offer = f"say with --val-labels which class each image has, by {LABEL_FORMS}"
    there = f"it holds {strays[0]}" if strays else "it is empty"
    raise SourceError(
        f"{path}: the split {split} has no folder named by a WordNet id (n01440764), {there}: "
        f"{offer or 'name its folders so, or remove it'}"
    )
