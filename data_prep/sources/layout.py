"""Where images lie in a source, told by names alone: class, split, and what is left out."""

import re
from typing import NamedTuple

from data_prep.manifest import SYNSET_PATTERN

MAX_IMAGE_BYTES = 1 << 29  # what claims to be larger is no image, and is not read into memory
NO_IMAGES = {"thumbs.db", "desktop.ini"}
_IMAGE_OF_SYNSET = re.compile(r"(n\d{8})_")

TRAIN_FOLDERS = {"train", "imagenet21k_train", "ilsvrc2012_img_train"}
VAL_FOLDERS = {"val", "validation", "imagenet21k_val", "ilsvrc2012_img_val"}
# ImageNet-21K-P leaves classes of less than 500 images to this folder.
SMALL_CLASS_FOLDERS = {"imagenet21k_small_classes"}


class Place(NamedTuple):
    """Where a file belongs, by its path; `reason`: why it is left out, empty where it is an image."""

    split: str
    wnid: str
    name: str
    reason: str = ""


def split_of_folder(name: str) -> str | None:
    """train, val or small_classes, for the usual names of a split's folder; None for others."""
    name = name.lower()
    folders = {"train": TRAIN_FOLDERS, "val": VAL_FOLDERS, "small_classes": SMALL_CLASS_FOLDERS}
    return next((split for split, names in folders.items() if name in names), None)


def place_in_tree(path: str, kind: str, size: int, split: str) -> Place:
    """Place of a file in a tree of class folders: `set/imagenet21k_val/n01440764/x.JPEG`."""
    parts = clean_name(path).split("/")
    at = next((i for i, part in enumerate(parts[:-1]) if SYNSET_PATTERN.fullmatch(part)), None)
    for part in reversed(parts[: len(parts) - 1 if at is None else at]):
        found = split_of_folder(part)
        if found == "small_classes":
            return Place(split, "", clean_name(path), "small_class")
        if found is not None:
            split = found
            break
    reason = reason_to_skip(path, kind, size) or ("no_class" if at is None else "")
    if reason or at is None:
        return Place(split, "", clean_name(path), reason)
    return Place(split, parts[at], "/".join(parts[at + 1 :]))


def base_name(path: str) -> str:
    """Last part of a path or URL."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def clean_name(name: str) -> str:
    """The name of a tar member without a leading `./` or `/`."""
    while name.startswith(("./", "/")):
        name = name[2:] if name[0] == "." else name[1:]
    return name


def reason_to_skip(name: str, kind: str, size: int) -> str | None:
    """Why a file or tar member is not read, or None where it is."""
    if kind == "link":
        return "link"
    last = base_name(name).lower()
    if kind != "file" or last.startswith(".") or last in NO_IMAGES:
        return "not_an_image"
    return "too_large" if size > MAX_IMAGE_BYTES else None


def wnid_of_image(name: str) -> str | None:
    """`n01440764_10026.JPEG` -> `n01440764`: ImageNet's own file names."""
    found = _IMAGE_OF_SYNSET.match(base_name(name))
    return found[1] if found else None


def synset_of_tar(name: str, *, compressed: bool = False) -> str | None:
    """`folder/n01440764.tar` -> `n01440764`; with `compressed`, `n01440764.tar.gz` too."""
    stem, dot, extension = base_name(name).partition(".")
    known = ("tar", "tar.gz", "tgz", "tar.bz2", "tar.xz") if compressed else ("tar",)
    return stem if dot and extension in known and SYNSET_PATTERN.fullmatch(stem) else None
