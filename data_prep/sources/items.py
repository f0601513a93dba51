"""What a source holds, as it is met: an image, a file that is not read, a part that cannot be."""

from typing import NamedTuple


class Record(NamedTuple):
    """One image file as it lies in the source. split: train or val; name: its path inside its class."""

    split: str
    wnid: str
    name: str
    data: bytes


class Stray(NamedTuple):
    """A file that is not read. reason: no_class, small_class, not_an_image, link or too_large."""

    split: str
    name: str
    bytes: int
    reason: str


class Damage(NamedTuple):
    """A part of the source that cannot be read."""

    split: str
    where: str
    detail: str


class Met(NamedTuple):
    """A class that is there, be it without images."""

    split: str
    wnid: str


Item = Record | Stray | Damage
Event = Item | Met
