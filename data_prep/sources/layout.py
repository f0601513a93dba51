"""Where images lie in a source, told by names alone: class, split, and what is left out."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from data_prep.manifest import SYNSET_PATTERN

MAX_IMAGE_BYTES = 1 << 29  # what claims to be larger is no image, and is not read into memory
NO_IMAGES = {"thumbs.db", "desktop.ini"}
# Folders that systems make for themselves, beside those whose names begin with a dot.
SYSTEM_FOLDERS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
IMAGE_NAME = r"(?i)\.(jpe?g|jfif|png|bmp|gif|webp|tiff?|ppm|pgm)$"  # also for Arrow's regular expressions
_IMAGE = re.compile(IMAGE_NAME)
_IMAGE_OF_SYNSET = re.compile(r"(n\d{8})_")
_SYNSET_WITHIN = re.compile(r"(?<![a-z0-9])n\d{8}(?!\d)", re.IGNORECASE)

TRAIN_FOLDERS = {"train", "training", "train_images", "imagenet21k_train", "ilsvrc2012_img_train"}
VAL_FOLDERS = {"val", "valid", "validation", "val_images", "imagenet21k_val", "ilsvrc2012_img_val"}
# ImageNet-21K-P leaves classes of less than 500 images to the first; nobody has the labels of the second.
SMALL_CLASS_FOLDERS = {"imagenet21k_small_classes"}
TEST_FOLDERS = {"test", "testing", "test_images", "ilsvrc2012_img_test"}
# Files that are left out as somebody meant it. Other images that are left out count for --max-reject.
INTENDED = {"small_class", "test_split", "hidden", "class_in_tar"}


class Place(NamedTuple):
    """Where a file belongs, by its path; `reason`: why it is left out, empty where it is an image."""

    split: str
    wnid: str
    name: str
    reason: str = ""


def split_of_folder(name: str) -> str | None:
    """train, val, small_classes or test, for the usual names of a split's folder; None for others."""
    name = name.lower()
    folders = {"train": TRAIN_FOLDERS, "val": VAL_FOLDERS, "small_classes": SMALL_CLASS_FOLDERS, "test": TEST_FOLDERS}
    return next((split for split, names in folders.items() if name in names), None)


def class_in_name(name: str) -> str | None:
    """The WordNet id in a name that has more around it, or a capital N: n01491361_great_white_shark, N01491361.

    None where there is none, where there are two, and where the name is just a WordNet id.
    """
    found = {wnid.lower() for wnid in _SYNSET_WITHIN.findall(name)}
    return found.pop() if len(found) == 1 and not SYNSET_PATTERN.fullmatch(name) else None


def class_of_name(name: str, rename: bool) -> str | None:
    """The class that a folder's name, or a tar's without its extension, tells; with `rename` by `class_in_name` too."""
    if SYNSET_PATTERN.fullmatch(name):
        return name
    return class_in_name(name) if rename and not is_hidden(name) else None


def place_in_tree(path: str, kind: str, size: int, split: str, rename: bool = False) -> Place:
    """Place of a file in a tree of class folders: `set/imagenet21k_val/n01440764/x.JPEG`."""
    name = clean_name(path)
    parts = name.split("/")
    at = next((i for i, part in enumerate(parts[:-1]) if SYNSET_PATTERN.fullmatch(part)), None)
    if at is None and rename:
        at = next((i for i, part in enumerate(parts[:-1]) if class_of_name(part, rename)), None)
    for part in reversed(parts[: len(parts) - 1 if at is None else at]):
        found = split_of_folder(part)
        if found in ("small_classes", "test") and not is_hidden(name):
            return Place(split, "", name, "small_class" if found == "small_classes" else "test_split")
        if found is not None:
            split = found
            break
    reason = reason_to_skip(name, kind, size) or ("no_class" if at is None else "")
    if reason or at is None:
        return Place(split, "", name, reason)
    return Place(split, class_of_name(parts[at], rename) or "", "/".join(parts[at + 1 :]))


def way_to_class(path: str, rename: bool = False) -> list[str] | None:
    """The folders above that of a class, `set/train/n01440764/x.JPEG` -> [set, train]; None without such a folder."""
    parts = clean_name(path).split("/")[:-1]
    at = next((i for i, part in enumerate(parts) if class_of_name(part, rename)), None)
    return None if at is None or is_hidden("/".join(parts)) else parts[:at]


def base_name(path: str) -> str:
    """Last part of a path or URL."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def clean_name(name: str) -> str:
    """The name of a tar member without a leading `./` or `/`."""
    while name.startswith(("./", "/")):
        name = name[2:] if name[0] == "." else name[1:]
    return name


def is_hidden(name: str) -> bool:
    """Whether a folder on the way to a file (or, of a folder, its own name) is none of the user's."""
    return bool(name) and any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in SYSTEM_FOLDERS
        for part in clean_name(name).split("/")
    )


def reason_to_skip(name: str, kind: str, size: int) -> str | None:
    """Why a file or tar member is not read, or None where it is. `name`: its path inside the source or the class."""
    if is_hidden(name.rpartition("/")[0]):
        return "hidden"
    if kind == "link":
        return "link"
    last = base_name(name).lower()
    if kind != "file" or last.startswith(".") or last in NO_IMAGES:
        return "not_an_image"
    return "too_large" if size > MAX_IMAGE_BYTES else None


def is_lost_image(name: str, reason: str) -> bool:
    """Whether a file that is left out, for that reason, is an image that the user will miss."""
    return reason not in INTENDED and reason != "not_an_image" and _IMAGE.search(name) is not None


def wnid_of_image(name: str) -> str | None:
    """`n01440764_10026.JPEG` -> `n01440764`: ImageNet's own file names."""
    found = _IMAGE_OF_SYNSET.match(base_name(name))
    return found[1] if found else None


def tar_stem(name: str, *, compressed: bool = False) -> str | None:
    """`folder/n01440764_tench.tar` -> `n01440764_tench`; with `compressed`, also of .tar.gz; None for another file."""
    stem, _, extension = base_name(name).partition(".")
    known = ("tar", "tar.gz", "tgz", "tar.bz2", "tar.xz") if compressed else ("tar",)
    if extension.lower() not in known:  # of every image
        return None
    return stem if stem and not is_hidden(name.rpartition("/")[0]) else None


def synset_of_tar(name: str, *, compressed: bool = False, rename: bool = False) -> str | None:
    """`folder/n01440764.tar` -> `n01440764`; with `compressed`, `n01440764.tar.gz` too; `rename`: `class_in_name`."""
    stem = tar_stem(name, compressed=compressed)
    return None if stem is None else class_of_name(stem, rename)


def lookalikes(names: Iterable[str]) -> list[str]:
    """Of paths of files that belong to no class: the folders or tars that look like a class's, each once."""
    parts = (part for name in names for part in clean_name(name).split("/") if _looks_like_class(part))
    return list(dict.fromkeys(parts))


def _looks_like_class(part: str) -> bool:
    return class_in_name(tar_stem(part, compressed=True) or part) is not None and not _IMAGE.search(part)


def offer_to_rename(found: list[str]) -> str:
    """What to say of such folders or tars; '' where there are none."""
    if not found:
        return ""
    wnid = class_in_name(tar_stem(found[0], compressed=True) or found[0])
    more = f" and {len(found) - 3:,} more" if len(found) > 3 else ""
    looks = "looks like a WordNet id" if len(found) == 1 else "look like WordNet ids"
    return f"{', '.join(found[:3])}{more} {looks} with something around: --rename-classes takes {found[0]} for {wnid}"
