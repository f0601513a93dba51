"""Small sets of images with masks in the layout of ADE20K, or with objects in that of COCO; and as shards by the real
command line.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.dense_sources import write
from tests.support.runs import run_module

CLASSES = ("ground", "red", "blue")
COLOURS = ((230, 40, 20), (20, 60, 230))


def scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Noise with a red and a blue square on it, the latter on top; (top, left, side) of each."""
    pixels, squares = rng.integers(90, 160, (height, width, 3), dtype=np.uint8), []
    for colour in COLOURS:
        side = int(rng.integers(15, 30))
        top, left = int(rng.integers(0, height - side)), int(rng.integers(0, width - side))
        pixels[top : top + side, left : left + side] = colour
        squares.append((top, left, side))
    return pixels, squares


def ade20k_folder(folder: Path, train: int = 40, val: int = 7, seed: int = 0) -> Path:
    """Noise with a red and a blue square on it, of odd sizes; the first two rows of each mask are ignored."""
    rng = np.random.default_rng(seed)
    for split, count in (("training", train), ("validation", val)):
        images, masks = folder / "images" / split, folder / "annotations" / split
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for number in range(count):
            height, width = (int(side) for side in rng.integers(60, 150, 2))
            pixels, squares = scene(rng, height, width)
            mask = np.ones((height, width), np.uint8)
            for label, (top, left, side) in enumerate(squares, 2):
                mask[top : top + side, left : left + side] = label
            mask[:2] = 0
            name = f"ADE_{'train' if split == 'training' else 'val'}_{number + 1:08d}"
            Image.fromarray(pixels).save(images / f"{name}.jpg", quality=95)
            Image.fromarray(mask).save(masks / f"{name}.png")
    lines = [f"{label}\t0.3\t1\t1\t{name}" for label, name in enumerate(CLASSES, 1)]
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines]) + "\n")
    return folder


def build_semantic(folder: Path) -> Path:
    """The same as shards of 20 samples; returns their folder."""
    source = ade20k_folder(folder / "ADEChallengeData2016")
    done = run_module(
        *("data_prep", "shard-dense", "--ade20k", str(source), "--output", str(folder / "squares")),
        *("--samples-per-shard", "20", "--workers", "1"),
    )
    assert done.returncode == 0, done.stderr
    return folder / "squares"


def coco_folder(folder: Path, train: int = 40, val: int = 7, seed: int = 0, masks: bool = True) -> Path:
    """The same pictures with a box around each square, and its mask; each fifth picture has none, the others a crowd
    in the upper left corner besides.
    """
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        images, objects = [], []
        (folder / f"{split}2017").mkdir(parents=True)
        for number in range(1, count + 1):
            height, width = (int(side) for side in rng.integers(60, 150, 2))
            pixels, squares = scene(rng, height, width)
            name = f"{number:012d}.jpg"
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            if number % 5 == 0:
                pixels, squares = rng.integers(90, 160, pixels.shape, dtype=np.uint8), []
            for label, (y, x, side) in enumerate([*squares, (0, 0, 9)][: 3 if squares else 0]):
                corners = [x, y, x + side, y, x + side, y + side, x, y + side]
                crowd = int(label == 2)
                known = {"id": len(objects) + 1, "image_id": number, "category_id": 10 * (label % 2 + 1)}
                known |= {"bbox": [x, y, side, side], "area": side * side, "iscrowd": crowd}
                objects.append(known | {"segmentation": [corners] if masks else []})
            Image.fromarray(pixels).save(folder / f"{split}2017" / name, quality=95)
        categories = [{"id": 10 * label, "name": name} for label, name in enumerate(CLASSES[1:], 1)]
        told = {"images": images, "annotations": objects, "categories": categories}
        write(folder / "annotations" / f"instances_{split}2017.json", json.dumps(told).encode())
    return folder


def build_instances(folder: Path, masks: bool = True) -> Path:
    """The same as shards of 20 samples; returns their folder."""
    source = coco_folder(folder / "coco", masks=masks)
    done = run_module(
        *("data_prep", "shard-dense", "--coco", str(source), "--output", str(folder / "boxes")),
        *("--samples-per-shard", "20", "--workers", "1"),
    )
    assert done.returncode == 0, done.stderr
    return folder / "boxes"
