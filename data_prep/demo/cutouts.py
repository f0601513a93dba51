"""What the demo's scenes are made of: clip art and stamps cut out by their own alpha, and photographs to put them on.

All are kept in one folder while scenes are composed, as one file of pixels that every process maps: each scene draws on
any of them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from data_prep.demo import clipart
from data_prep.demo.archive import DemoError, Picture, in_processes, require, say
from data_prep.images.pixels import decode_image

CUTOUT_SIDE = 144  # pixels of the longer side: none is drawn larger
PHOTO_SIDE = 720
SOLID = 128  # alpha from which a pixel is the object's
LEAST_SIDE = 16
LEAST_SHARE = 0.03  # of solid pixels in a drawing: fewer are hair lines
VAL_SHARE = 0.22  # of a class's pictures, whole groups: as demo-1k is split
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Entry:
    """Where the pixels of a picture lie in the store; `label` is -1 for a photograph."""

    split: str
    label: int
    name: str
    offset: int
    height: int
    width: int
    channels: int


class Store:
    """Cut-outs and photographs in a folder."""

    def __init__(self, folder: Path):
        self.pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        self.cutouts: dict[tuple[str, int], list[Entry]] = defaultdict(list)
        self.photographs: dict[str, list[Entry]] = defaultdict(list)
        for told in json.loads((folder / "entries.json").read_text()):
            entry = Entry(**told)
            if entry.label < 0:
                self.photographs[entry.split].append(entry)
            else:
                self.cutouts[entry.split, entry.label].append(entry)

    def image(self, entry: Entry) -> Image.Image:
        """The picture, RGBA or RGB."""
        size = entry.height * entry.width * entry.channels
        flat = np.array(self.pixels[entry.offset : entry.offset + size])
        return Image.fromarray(flat.reshape(entry.height, entry.width, entry.channels))


@lru_cache(maxsize=2)
def open_store(folder: str) -> Store:
    """The store of a folder, once in a process."""
    return Store(Path(folder))


def load_scene_rules() -> dict[str, Any]:
    """scenes.yaml."""
    return yaml.safe_load(resources.files("data_prep.demo").joinpath("scenes.yaml").read_bytes())


def labels_of(rules: dict[str, Any], scene_rules: dict[str, Any]) -> dict[str, int]:
    """The scenes' class of each WordNet id of the clip art. Raises ValueError where a synset is in none, or in two."""
    ids = {entry["lemma"]: wnid for wnid, entry in rules["clipart"].items()}
    grouped = [lemma for lemmas in scene_rules["classes"].values() for lemma in lemmas]
    if sorted(grouped) != sorted(ids):
        odd = set(ids).symmetric_difference(grouped) or {lemma for lemma in grouped if grouped.count(lemma) > 1}
        raise ValueError(
            f"scenes.yaml: {', '.join(sorted(odd))} must be in one of its classes, as a lemma of synsets.yaml"
        )
    return {ids[lemma]: label for label, lemmas in enumerate(scene_rules["classes"].values()) for lemma in lemmas}


def cut_out(source: clipart.Source) -> tuple[Picture, np.ndarray | None] | None:
    """(the picture as demo-1k has it, its pixels, uint8 (height, width, 4), or None where it has no alpha)."""
    image = clipart.decoded(source)
    picture = None if image is None else clipart.picture_of(source, image)
    if image is None or picture is None:
        return None
    image.thumbnail((CUTOUT_SIDE * 2, CUTOUT_SIDE * 2), Image.Resampling.BOX)
    solid = np.asarray(image.getchannel("A")) >= SOLID
    if solid.all() or solid.mean() < LEAST_SHARE:
        return picture, None
    rows, columns = (np.flatnonzero(solid.any(axis=axis)) for axis in (1, 0))
    image = image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    image.thumbnail((CUTOUT_SIDE, CUTOUT_SIDE), Image.Resampling.LANCZOS)
    return picture, np.asarray(image) if min(image.size) >= LEAST_SIDE else None


def prepare_store(folder: Path, cache: Path, rules: dict[str, Any], scene_rules: dict[str, Any]) -> dict[str, str]:
    """Fill an empty folder with the cut-outs and photographs of all packages; returns the packages' versions.

    Pictures are those of demo-1k with alpha, and lie on the same side of its split. Raises DemoError.
    """
    require("dpkg", "scenes")
    debs = {short: clipart.fetch(cache, package, "scenes") for short, (package, _) in clipart.PACKAGES.items()}
    for package, told in scene_rules["packages"].items():
        debs[package] = clipart.fetch(cache, package, "scenes", told["megabytes"])
    labels = labels_of(rules, scene_rules)
    with clipart.unpacked(cache, debs, "scenes") as folders:
        sources = clipart.find_sources(clipart.picture_folders(folders), rules)
        cut = [found for found in in_processes(cut_out, sources, "cut-outs") if found is not None]
        photographs = [
            (split, name, _photograph(folders[package] / told["folder"], name))
            for package, told in sorted(scene_rules["packages"].items())
            for split in SPLITS
            for name in told[split]
        ]
    # Grouped and split with those that cannot be cut out: each lies where demo-1k has it.
    pixels = {picture.name: array for picture, array in cut}
    sides = clipart.split(clipart.group(clipart.distinct(picture for picture, _ in cut)), VAL_SHARE)
    drawn = []
    for split, pictures in zip(SPLITS, sides, strict=True):
        for picture in pictures:
            array = pixels[picture.name]
            if array is not None:
                drawn.append((split, labels[picture.wnid], picture.name, array))
        of_split = [entry for entry in drawn if entry[0] == split]
        lacking = set(labels.values()) - {entry[1] for entry in of_split}
        if lacking:
            names = ", ".join(name for label, name in enumerate(scene_rules["classes"]) if label in lacking)
            raise DemoError(f"no cut-outs of {names} for {split}: other versions of the packages?")
        say(f"{split}: {len(of_split):,} cut-outs, {sum(photo[0] == split for photo in photographs)} photographs")
    write_store(folder, [*drawn, *((split, -1, name, array) for split, name, array in photographs)])
    return {deb.name.split("_")[0]: clipart.version_of(deb) for deb in debs.values()}


def write_store(folder: Path, pictures: Sequence[tuple[str, int, str, np.ndarray]]) -> None:
    """Pictures as (split, label or -1, name, pixels), in any order."""
    entries, at = [], 0
    ordered = sorted(pictures, key=lambda picture: picture[:3])
    for split, label, name, array in ordered:
        entries.append(Entry(split, label, name, at, *array.shape).__dict__)
        at += array.size
    np.save(folder / "pixels.npy", np.concatenate([array.ravel() for *_, array in ordered]))
    (folder / "entries.json").write_text(json.dumps(entries))


def _photograph(folder: Path, name: str) -> np.ndarray:
    files = sorted(folder.glob(f"{name}.*"))
    if not files:
        raise DemoError(f"{folder.name} has no photograph {name}: another version of its package? See scenes.yaml")
    image = Image.fromarray(decode_image(files[0].read_bytes()).pixels)
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)
