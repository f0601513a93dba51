"""The demo's scenes as data sets are published: masks in the layout of ADEChallengeData2016, as its zip, and instances
in that of COCO 2017, as folders. Both hold the same pictures.

    OUTPUT/demo-scenes/ADEChallengeData2016.zip
    OUTPUT/demo-scenes/coco/{train2017,val2017}/, coco/annotations/instances_{train,val}2017.json
    OUTPUT/demo-scenes/ATTRIBUTION.md, scenes.json
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.demo import clipart
from data_prep.demo.archive import in_processes, jpeg_bytes, say
from data_prep.demo.cutouts import load_scene_rules, prepare_store
from data_prep.demo.scenes import SceneTask, compose
from data_prep.storage import Folder, atomic_folder, refuse_unwritable
from data_prep.writer import sole_writer

NAME = "demo-scenes"
BACKGROUND = "background"  # the last class of the masks
RECIPE = 3  # raise it when the code changes the scenes: those of an older recipe are made anew
ADE = "ADEChallengeData2016"
ADE_FOLDERS = {"train": "training", "val": "validation"}
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the same bytes each time


@dataclass(frozen=True)
class Drawn:
    """A scene, encoded. `objects`: (label, box x, y, width, height, pixels, run lengths of COCO) of each."""

    number: int
    size: tuple[int, int]
    jpeg: bytes
    mask: bytes
    objects: tuple[tuple[int, tuple[int, int, int, int], int, list[int]], ...]
    place: str


def build_scenes(
    output: Path, cache: Path, rules: dict[str, Any], *, counts: tuple[int, int], seed: int, force: bool = False
) -> None:
    """Write OUTPUT/demo-scenes with counts = (training, validation) scenes, unless it is there already.

    Raises DemoError where the packages cannot be had.
    """
    scene_rules = load_scene_rules()
    recipe = json.dumps([scene_rules, rules["clipart"]], sort_keys=True)
    wanted = {
        "recipe": f"{RECIPE}, {hashlib.sha256(recipe.encode()).hexdigest()[:12]}",
        "scenes": list(counts),
        "seed": seed,
    }
    refuse_unwritable(Folder(output), "choose another --output")
    with sole_writer(Folder(output)):
        record = output / NAME / "scenes.json"
        if not force and record.is_file() and json.loads(record.read_text()) == wanted:
            say(f"{NAME}: already built in {output}")
            return
        refuse_unwritable(Folder(cache), "choose another --cache")
        cache.mkdir(parents=True, exist_ok=True)
        classes = list(scene_rules["classes"])
        with tempfile.TemporaryDirectory(prefix=".scenes-", dir=cache) as store:
            versions = prepare_store(Path(store), cache, rules, scene_rules)
            with atomic_folder(output / NAME) as folder:
                write_layouts(folder, store, classes, counts, seed)
                (folder / "ATTRIBUTION.md").write_text(attribution(versions, scene_rules), encoding="utf-8")
                (folder / "scenes.json").write_text(json.dumps(wanted, indent=1) + "\n")
    say(f"{output / NAME}: {counts[0]:,} + {counts[1]:,} scenes; authors and licences: ATTRIBUTION.md in there")


def write_layouts(folder: Path, store: str, classes: list[str], counts: tuple[int, int], seed: int) -> None:
    """Compose the scenes and write both layouts into a folder; `store`: the folder of `cutouts.write_store`."""
    coco = folder / "coco"
    (coco / "annotations").mkdir(parents=True)
    pixels, images = Counter[int](), {split: Counter[int]() for split in ADE_FOLDERS}
    scenes: list[str] = []
    with zipfile.ZipFile(folder / f"{ADE}.zip", "w") as archive:
        for split, count in zip(ADE_FOLDERS, counts, strict=True):
            (coco / f"{split}2017").mkdir()
            told: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
            tasks = [SceneTask(store, seed, split, number, len(classes)) for number in range(1, count + 1)]
            for drawn in in_processes(draw_scene, tasks, f"scenes of {split}"):
                name = f"ADE_{split}_{drawn.number:08d}"
                _add(archive, f"images/{ADE_FOLDERS[split]}/{name}.jpg", drawn.jpeg)
                _add(archive, f"annotations/{ADE_FOLDERS[split]}/{name}.png", drawn.mask)
                scenes.append(f"{name} {drawn.place}")
                (coco / f"{split}2017" / f"{drawn.number:012d}.jpg").write_bytes(drawn.jpeg)
                _tell(told, drawn)
                images[split].update({each[0] for each in drawn.objects})
                left = drawn.size[0] * drawn.size[1] - sum(area for _, _, area, _ in drawn.objects)
                images[split][len(classes)] += left > 0
                if split == "train":
                    pixels.update({len(classes): left})
                    for label, _, area, _ in drawn.objects:
                        pixels[label] += area
            categories = [{"id": label + 1, "name": name, "supercategory": ""} for label, name in enumerate(classes)]
            text = json.dumps({"info": {"description": NAME}, **told, "categories": categories}, separators=(",", ":"))
            (coco / "annotations" / f"instances_{split}2017.json").write_text(text)
        rows = ["Idx\tRatio\tTrain\tVal\tName"]
        for label, name in enumerate([*classes, BACKGROUND]):
            share = pixels[label] / max(1, pixels.total())
            rows.append(f"{label + 1}\t{share:.4f}\t{images['train'][label]}\t{images['val'][label]}\t{name}")
        _add(archive, "objectInfo150.txt", ("\n".join(rows) + "\n").encode())
        _add(archive, "sceneCategories.txt", ("\n".join(scenes) + "\n").encode())


def draw_scene(task: SceneTask) -> Drawn:
    """Compose and encode one scene."""
    scene = compose(task)
    height, width, _ = scene.pixels.shape
    labelled = np.full((height, width), task.classes + 1, np.uint8)  # what shows no object is a class too
    objects = []
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        labelled[mask] = label + 1
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        box = (int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1)
        objects.append((label, box, int(np.count_nonzero(mask)), run_lengths(mask)))
    png = io.BytesIO()
    Image.fromarray(labelled).save(png, "PNG")
    jpeg = jpeg_bytes(Image.fromarray(scene.pixels))
    return Drawn(task.number, (width, height), jpeg, png.getvalue(), tuple(objects), scene.place)


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of a bool (height, width) mask: column by column, zeros first."""
    flat = mask.ravel(order="F").astype(np.int8)
    starts = np.flatnonzero(np.diff(flat, prepend=0)).tolist()  # a mask that begins with ones has 0 zeros first
    return np.diff([0, *starts, flat.size]).tolist()


def attribution(versions: dict[str, str], scene_rules: dict[str, Any]) -> str:
    """Markdown: the packages, their licences, what is taken of them."""
    licences = {
        clipart.PACKAGES["oc"][0]: "public domain (Open Clip Art Library)",
        clipart.PACKAGES["tp"][0]: "GPL-2 (Bill Kendrick and the Tux Paint artists)",
        **{package: told["licence"] for package, told in scene_rules["packages"].items()},
    }
    lines = [
        "# Where the pictures of the scenes come from",
        "",
        "Cut-outs were turned, scaled and put on parts of photographs; these were scaled, mirrored, made darker or "
        "lighter.",
        "",
        "| Debian package | version | licence |",
        "|---|---|---|",
        *(f"| {package} | {versions[package]} | {licences[package]} |" for package in sorted(versions)),
        "",
        "They are made on your machine and are no part of this project. Whoever passes them on does so under the "
        "licences of all of these.",
        "",
    ]
    return "\n".join(lines)


def _tell(told: dict[str, list[dict[str, Any]]], drawn: Drawn) -> None:
    width, height = drawn.size
    name = f"{drawn.number:012d}.jpg"
    told["images"].append({"id": drawn.number, "file_name": name, "width": width, "height": height})
    for label, box, area, runs in drawn.objects:
        told["annotations"].append(
            {
                "id": len(told["annotations"]) + 1,
                "image_id": drawn.number,
                "category_id": label + 1,
                "bbox": list(box),
                "area": area,
                "iscrowd": 0,
                "segmentation": {"size": [height, width], "counts": runs},
            }
        )


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(f"{ADE}/{name}", ZIP_DATE), data)
