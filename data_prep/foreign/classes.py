"""What a WebDataset sample says of its class: one rule for tars that are indexed and for tars that are streamed."""

import json
import re
from typing import NamedTuple

from data_prep.manifest import SYNSET_PATTERN
from data_prep.sources.layout import is_hidden

IMAGES = ("jpg", "jpeg", "png", "webp")  # in order of preference, where a sample has several
MAX_JSON_BYTES = 1 << 20  # what is larger holds more than a label
WNID_IN_NAME = re.compile(r"(?:^|/)(n\d{8})(?=[_./]|$)")


class Told(NamedTuple):
    """A class as a WordNet id ("": not told) and as a number (-1: not told)."""

    wnid: str = ""
    number: int = -1

    def __bool__(self) -> bool:
        return bool(self.wnid) or self.number >= 0


def is_of_sample(name: str) -> bool:
    """Whether a member of a tar may be a part of a sample, by its name: no system's junk, no note of webdataset's."""
    folder, _, file = name.rpartition("/")
    return not (is_hidden(folder) or file.startswith(".") or name.startswith("__"))


def class_of(key: str, cls: bytes | None, json_data: bytes | None) -> Told:
    """The class in a sample's `.json` or `.cls`, or in its key. A WordNet id in either is taken as one."""
    wnid, number = "", -1
    if cls is not None:
        wnid, number = _told(cls.decode("utf-8", "replace").strip())
    if json_data is not None and len(json_data) <= MAX_JSON_BYTES:
        told = _fields(json_data)
        names = [str(told[field]) for field in ("wnid", "synset", "filename") if isinstance(told.get(field), str)]
        found = next((match[0] for name in names if (match := WNID_IN_NAME.findall(name))), "")
        label_wnid, label_number = _told(told.get("label"))
        wnid = found or wnid or label_wnid
        number = number if number >= 0 else label_number
    return Told(wnid or next(iter(WNID_IN_NAME.findall(key)), ""), number)


def _told(label: object) -> Told:
    if type(label) is int:
        return Told("", label if 0 <= label < 1 << 31 else -1)
    if not isinstance(label, str):
        return Told()
    if SYNSET_PATTERN.fullmatch(label):
        return Told(label)
    return Told("", int(label) if label.isascii() and label.isdigit() and len(label) < 10 else -1)


def _fields(data: bytes) -> dict[str, object]:
    try:
        told = json.loads(data)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
