"""What a WebDataset sample says of its class, and which of its files count: for tars that are indexed or streamed."""

import json
import re
from typing import NamedTuple

from data_prep.manifest import SYNSET_PATTERN
from data_prep.sources.layout import is_hidden

# In order of preference, where a sample has several. What of them cannot be decoded is told by name, by `verify` and by
# a run; it is never "no image".
IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "ppm")
MAX_CLASS_BYTES, MAX_JSON_BYTES = 1 << 10, 1 << 20  # what is larger holds more than a label

WNID_IN_NAME = re.compile(r"(?:^|/)(n\d{8})(?=[_./]|$)")
WNID_FIELDS = ("wnid", "synset", "label", "filename")  # of a JSON; the first that names one counts
MAX_DIGITS = 9


class Told(NamedTuple):
    """A WordNet id, or "", and a class number, or -1."""

    wnid: str = ""
    number: int = -1

    def __bool__(self) -> bool:
        return bool(self.wnid) or self.number >= 0


NONE = Told()


def is_of_sample(name: str) -> bool:
    """Whether a member of a tar may be a part of a sample, by its name: no system's junk, no note of webdataset's."""
    folder, _, file = name.rpartition("/")
    return not (is_hidden(folder) or file.startswith(".") or name.startswith("__"))


def class_of(key: str, cls: bytes | None, json_data: bytes | None) -> Told:
    """What a sample's `.cls`, `.json` and key say together: the first WordNet id of them, and the first number."""
    told = []
    if cls is not None and len(cls) <= MAX_CLASS_BYTES:
        told.append(class_of_text(cls.decode("utf-8", "replace")))
    if json_data is not None and len(json_data) <= MAX_JSON_BYTES:
        told.append(class_of_json(json_data))
    wnid = next((each.wnid for each in told if each.wnid), "") or wnid_in(key)
    return Told(wnid, next((each.number for each in told if each.number >= 0), -1))


def wnid_in(name: str) -> str:
    """The first WordNet id that begins a name or a folder of it: `a/n01440764_10026` -> `n01440764`; "" for none."""
    return next(iter(WNID_IN_NAME.findall(name)), "")


def class_of_text(text: str) -> Told:
    """The content of a `.cls`."""
    text = text.strip()
    if SYNSET_PATTERN.fullmatch(text):
        return Told(wnid=text)
    return Told(number=int(text)) if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS else NONE


def class_of_json(data: bytes) -> Told:
    """The content of a `.json`: a WordNet id in one of WNID_FIELDS, a number in "label"."""
    try:
        said = json.loads(data)
    except ValueError:
        return NONE
    if not isinstance(said, dict):
        return NONE
    label = said.get("label")
    number = class_of_text(label).number if isinstance(label, str) else -1
    if type(label) is int and 0 <= label < 1 << 31:
        number = label
    names = [said[field] for field in WNID_FIELDS if isinstance(said.get(field), str)]
    return Told(next((wnid for name in names if (wnid := wnid_in(name))), ""), number)
