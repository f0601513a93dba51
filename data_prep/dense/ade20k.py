"""ADE20K as it is published for scene parsing: `ADEChallengeData2016/`, a folder or the zip.

    images/{training,validation}/ADE_train_00000001.jpg
    annotations/{training,validation}/ADE_train_00000001.png    8 bits: 0 unlabelled, 1 to 150 the class
    objectInfo150.txt                                            tab-separated: Idx, Ratio, Train, Val, Name
    sceneCategories.txt                                          ADE_train_00000001 airport_terminal

Sets of one's own in this layout have as many classes as their objectInfo150.txt lists.
"""

import os
from pathlib import Path

from data_prep.dense.source import Item, Source, SourceSplit, fingerprint_of, key_of, listing_digest, refuse_same_keys
from data_prep.dense.tree import DenseSourceError, Stat, Tree, UnreadableFile

NAME = "ADEChallengeData2016"
FOLDERS = {"train": "training", "val": "validation"}
CLASSES_FILE, SCENES_FILE = "objectInfo150.txt", "sceneCategories.txt"
IMAGES = (".jpg", ".jpeg", ".png")
MOST_CLASSES = 255  # labels are 8 bits, and 255 is "ignored"


def open_ade20k(path: str, splits: tuple[str, ...]) -> Source:
    """What lies in the folder or zip. Raises DenseSourceError where it is not of this layout."""
    tree = _root(path)
    classes, classes_digest = _classes(tree)
    scenes, scenes_digest = _scenes(tree)
    found = []
    parts: dict[str, object] = {"classes": classes_digest, "scenes": scenes_digest}
    for name in splits:
        split, listing = _split(tree, name, scenes)
        found.append(split)
        parts[name] = listing
    return Source(
        kind="ADE20K",
        task="semantic",
        path=path,
        classes=classes,
        category_ids=list(range(1, len(classes) + 1)),
        splits=found,
        fingerprint=fingerprint_of(parts),
    )


def _root(path: str) -> Tree:
    """The tree that has images/training, wherever it begins below `path`."""
    if os.path.isfile(path):
        candidates = [Tree(path, NAME), Tree(path)]
    elif os.path.isdir(path):
        candidates = [Tree(path), Tree(path, NAME)]
        archive = os.path.join(path, f"{NAME}.zip")
        candidates += [Tree(archive, NAME), Tree(archive)] if os.path.isfile(archive) else []
    else:
        raise DenseSourceError(f"{path} does not exist: give the folder {NAME}, or {NAME}.zip")
    for tree in candidates:
        if any(tree.has_folder(f"images/{folder}") for folder in FOLDERS.values()):
            return tree
    raise DenseSourceError(
        f"{path} has no images/training or images/validation: give the folder {NAME} or its zip (the full ADE20K, with "
        "masks in colours, is another set)"
    )


def _read(tree: Tree, name: str) -> str | None:
    files = Tree(tree.path, tree.root)
    with files.opened() as reader:
        try:
            return reader.read(name).decode("utf-8", "replace")
        except UnreadableFile:
            return None


def _classes(tree: Tree) -> tuple[list[str], list[str]]:
    text = _read(tree, CLASSES_FILE)
    if text is None:
        raise DenseSourceError(f"{tree} has no readable {CLASSES_FILE}, which names the classes: fetch it again")
    rows = [[cell.strip() for cell in line.split("\t")] for line in text.splitlines() if line.strip()]
    where = f"{CLASSES_FILE} in {tree}"
    if not rows or not {"Idx", "Name"} <= set(rows[0]):
        raise DenseSourceError(
            f"{where} does not begin with the columns Idx and Name, separated by tabs: fetch it again"
        )
    number, name = rows[0].index("Idx"), rows[0].index("Name")
    classes: list[str] = []
    for row in rows[1:]:
        if len(row) <= max(number, name) or row[number] != str(len(classes) + 1) or not row[name]:
            raise DenseSourceError(
                f"{where}: line {len(classes) + 2} is not class {len(classes) + 1} with a name: {' '.join(row)!r}"
            )
        classes.append(row[name])
    if not 1 <= len(classes) < MOST_CLASSES:
        raise DenseSourceError(f"{where} lists {len(classes)} classes; masks of 8 bits hold 1 to {MOST_CLASSES - 1}")
    return classes, classes


def _scenes(tree: Tree) -> tuple[dict[str, str], list[str]]:
    """Stem of an image -> its scene; empty where the file is not there."""
    lines = [line.split() for line in (_read(tree, SCENES_FILE) or "").splitlines()]
    scenes = {line[0]: line[1] for line in lines if len(line) == 2}
    return scenes, [f"{stem} {scene}" for stem, scene in sorted(scenes.items())]


def _split(tree: Tree, name: str, scenes: dict[str, str]) -> tuple[SourceSplit, list[str]]:
    images, masks = (tree.inside(f"{part}/{FOLDERS[name]}") for part in ("images", "annotations"))
    for part in (images, masks):
        folder, _, last = part.root.rpartition("/")
        if not Tree(tree.path, folder).has_folder(last):
            raise DenseSourceError(f"{part} is missing or empty: fetch it again; or leave it out with --splits")
    image_files, mask_files = images.files(), masks.files()
    by_stem = _by_stem(image_files, IMAGES)
    masks_by_stem = _by_stem(mask_files, (".png",))
    if not by_stem:
        raise DenseSourceError(f"{images} holds no images: fetch it again")
    items = [
        Item(
            key=key_of(file_name),
            image_id=number,
            file_name=Path(file_name).name,
            image=file_name if stem in by_stem else None,
            mask=masks_by_stem.get(stem),
            scene=scenes.get(Path(stem).name),
        )
        for number, stem in enumerate(sorted(by_stem.keys() | masks_by_stem.keys()), 1)
        for file_name in [by_stem.get(stem, f"{stem}.jpg")]
    ]
    refuse_same_keys(items, str(images))
    split = SourceSplit(name, images, items, masks, sum(stat.bytes for stat in image_files.values()))
    return split, [listing_digest(image_files), listing_digest(mask_files)]


def _by_stem(files: dict[str, Stat], endings: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in files:
        stem, ending = os.path.splitext(name)
        if ending.lower() in endings:
            found.setdefault(stem, name)
    return found
