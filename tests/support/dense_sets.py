"""A small set of images with masks in the layout of ADE20K, and as shards by the real command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.runs import run_module

CLASSES = ("ground", "red", "blue")
COLOURS = ((230, 40, 20), (20, 60, 230))


def ade20k_folder(folder: Path, train: int = 40, val: int = 7, seed: int = 0) -> Path:
    """Noise with a red and a blue square on it, of odd sizes; the first two rows of each mask are ignored."""
    rng = np.random.default_rng(seed)
    for split, count in (("training", train), ("validation", val)):
        images, masks = folder / "images" / split, folder / "annotations" / split
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for number in range(count):
            height, width = (int(side) for side in rng.integers(60, 150, 2))
            pixels = rng.integers(90, 160, (height, width, 3), dtype=np.uint8)
            mask = np.ones((height, width), np.uint8)
            for label, colour in enumerate(COLOURS, 2):
                side = int(rng.integers(15, 30))
                top, left = int(rng.integers(0, height - side)), int(rng.integers(0, width - side))
                pixels[top : top + side, left : left + side] = colour
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
