"""COCO's instances as they are published: a folder with the archives, with what was in them, or with some of each.

    train2017/, val2017/                     or train2017.zip, val2017.zip
    annotations/instances_train2017.json     or annotations_trainval2017.zip
    annotations/instances_val2017.json

What would spoil a run or an evaluation without a word is refused before any image is read: annotation ids below 1 (the
evaluators take 0 for "no match") or given twice, images given twice, splits of different classes.
"""

import gc
import hashlib
import json
import os
import re
from collections import defaultdict
from typing import Any

from data_prep.dense.ledger import row
from data_prep.dense.source import Item, Source, SourceSplit, fingerprint_of, key_of, listing_digest, refuse_same_keys
from data_prep.dense.tree import DenseSourceError, Stat, Tree, UnreadableFile

ARCHIVE = "annotations_trainval{year}.zip"
INSTANCES = re.compile(r"instances_(train|val)(\w*)\.json")
MAX_JSON_BYTES = 8 << 30
IMAGES = (".jpg", ".jpeg", ".png")


def open_coco(path: str, splits: tuple[str, ...]) -> Source:
    """What lies in the folder. Raises DenseSourceError where it is not of this layout, or would mislead evaluation."""
    if not os.path.isdir(path):
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise DenseSourceError(
            f"{path} {what}: give the folder that holds train2017, val2017 and annotations, or their zips"
        )
    found, parts, categories = [], {}, None
    for name in splits:
        tree, file = _annotations(path, name)
        told, digest = _load(tree, file, path)
        here = _categories(told, file)
        if categories is not None and here != categories:
            raise DenseSourceError(f"{path}: {file} has other categories than the other split: give files of one set")
        categories = here
        split, listing = _split(path, name, file, told, here)
        found.append(split)
        parts[name] = [digest, listing]
        del told
    assert categories is not None
    return Source(
        kind="COCO instances",
        task="instance",
        path=path,
        classes=list(categories.values()),
        category_ids=list(categories),
        splits=found,
        fingerprint=fingerprint_of(parts),
    )


def _annotations(path: str, split: str) -> tuple[Tree, str]:
    """Where the annotations of a split are: the tree, and the file's name in it."""
    trees = [Tree(path, "annotations")] if os.path.isdir(os.path.join(path, "annotations")) else []
    for name in sorted(os.listdir(path)):
        if re.fullmatch(r"annotations_trainval\w*\.zip", name):
            trees.append(Tree(os.path.join(path, name), "annotations"))
    for tree in trees:
        names = [name for name in tree.files() if (match := INSTANCES.fullmatch(name)) and match[1] == split]
        if len(names) > 1:
            raise DenseSourceError(f"{tree} holds {' and '.join(names)}: give a folder with one of them")
        if names:
            return tree, names[0]
    raise DenseSourceError(
        f"{path} has no annotations/instances_{split}2017.json, nor {ARCHIVE.format(year=2017)} with it: fetch it, or "
        f"leave {split} out with --splits"
    )


def _load(tree: Tree, file: str, path: str) -> tuple[dict[str, Any], str]:
    with tree.opened() as reader:
        try:
            data = reader.read(file, MAX_JSON_BYTES)
        except UnreadableFile as error:
            raise DenseSourceError(f"{path}: {file} cannot be read ({error}): fetch it again") from None
    digest = hashlib.sha256(data).hexdigest()
    collecting = gc.isenabled()
    gc.disable()  # millions of small objects that all stay: looking for circles among them doubles the time
    try:
        told = json.loads(data)
    except ValueError as error:
        raise DenseSourceError(f"{path}: {file} is not readable JSON ({error}): fetch it again") from None
    finally:
        if collecting:
            gc.enable()
    for part in ("images", "annotations", "categories"):
        entries = told.get(part) if isinstance(told, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DenseSourceError(f"{path}: {file} has no list of {part}: give a file named instances_*.json of COCO")
    return told, digest


def _categories(told: dict[str, Any], file: str) -> dict[int, str]:
    """Category id -> name, by id: the position is the label."""
    found: dict[int, str] = {}
    for entry in told["categories"]:
        number, name = entry.get("id"), entry.get("name")
        if type(number) is not int or not isinstance(name, str) or not name:
            raise DenseSourceError(
                f"{file}: category {entry} has no whole number as id, or no name: number and name it"
            )
        if number in found:
            raise DenseSourceError(f"{file}: category id {number} is given twice: number them anew")
        found[number] = name
    if not found:
        raise DenseSourceError(f"{file} lists no categories: give the file of the training set")
    return dict(sorted(found.items()))


def _split(
    path: str, name: str, file: str, told: dict[str, Any], categories: dict[int, str]
) -> tuple[SourceSplit, str]:
    images = _images(path, name, INSTANCES.fullmatch(file)[2])  # type: ignore[index]  # it matched before
    files = {inner: stat for inner, stat in images.files().items() if inner.lower().endswith(IMAGES)}
    entries = _image_entries(told["images"], file)
    of_image, strays = _by_image(told["annotations"], entries, categories, file, name)
    items = [
        Item(
            key=key_of(entry["file_name"]),
            image_id=number,
            file_name=entry["file_name"],
            image=entry["file_name"] if entry["file_name"] in files else None,
            width=_size(entry.get("width")),
            height=_size(entry.get("height")),
            annotations=tuple(sorted(of_image[number], key=lambda annotation: annotation["id"])),
        )
        for number, entry in sorted(entries.items())
    ]
    if items and not any(item.image for item in items):
        raise DenseSourceError(f"{images} holds none of the images of {file}, such as {items[0].file_name}")
    refuse_same_keys(items, str(images))
    wanted = {item.image: files[item.image] for item in items if item.image}
    split = SourceSplit(name, images, items, image_bytes=sum(stat.bytes for stat in wanted.values()), strays=strays)
    return split, listing_digest({str(inner): Stat(*stat) for inner, stat in wanted.items()})


def _images(path: str, split: str, year: str) -> Tree:
    folder = f"{split}{year}"
    for tree in (Tree(path), Tree(path, "images")):
        if tree.has_folder(folder):
            return tree.inside(folder)
    for archive in (os.path.join(path, f"{folder}.zip"), os.path.join(path, "images", f"{folder}.zip")):
        if os.path.isfile(archive):
            tree = Tree(archive)
            return tree.inside(folder) if tree.has_folder(folder) else tree
    raise DenseSourceError(
        f"{path} has neither a folder {folder} nor {folder}.zip: fetch it, or leave it out (--splits)"
    )


def _image_entries(images: list[dict[str, Any]], file: str) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    names: dict[str, int] = {}
    for entry in images:
        number, name = entry.get("id"), entry.get("file_name")
        if type(number) is not int or not isinstance(name, str) or not name:
            raise DenseSourceError(f"{file}: image {_brief(entry)} has no whole number as id, or no file_name")
        if number in found:
            raise DenseSourceError(f"{file}: image id {number} is given twice ({found[number]['file_name']}, {name})")
        if name in names:
            raise DenseSourceError(f"{file}: {name} is given twice (ids {names[name]}, {number}): leave one out")
        found[number], names[name] = entry, number
    return found


def _by_image(
    annotations: list[dict[str, Any]], images: dict[int, Any], categories: dict[int, str], file: str, split: str
) -> tuple[dict[int, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Annotations of each image, and rows of those that evaluation does not look at: of no image, or of no class."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    strays: list[dict[str, Any]] = []
    ids: set[int] = set()
    for annotation in annotations:
        number = annotation.get("id")
        if type(number) is not int:
            raise DenseSourceError(
                f"{file}: annotation {_brief(annotation)} has no whole number as id: number them from 1"
            )
        if number < 1:
            raise DenseSourceError(
                f"{file}: annotation id {number}: the evaluators take 0 for an object that nothing was matched to, so "
                "that perfect results are scored as misses: number them from 1"
            )
        if number in ids:
            raise DenseSourceError(f"{file}: annotation id {number} is given twice: number them anew, from 1")
        ids.add(number)
        of, category = annotation.get("image_id"), annotation.get("category_id")
        if type(of) is not int or of not in images:
            strays.append(row(split, "", "dropped", "unknown_image", f"image_id {of}", annotation_id=number))
        elif type(category) is not int or category not in categories:
            name, detail = images[of]["file_name"], f"category_id {category}"
            strays.append(row(split, name, "dropped", "unknown_category", detail, image_id=of, annotation_id=number))
        else:
            found[of].append(annotation)
    return found, strays


def _size(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _brief(entry: dict[str, Any]) -> str:
    text = json.dumps(entry)
    return text if len(text) <= 80 else f"{text[:80]}..."
