"""Small made-up sources in the layouts of ADE20K and of COCO; and the samples of what was built of them."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.dense_set import DenseManifest

CLASSES = ("wall", "building, edifice", "sky")
CATEGORIES = {3: "car", 17: "cat", 90: "toothbrush"}  # ids with gaps, as COCO's
ADE_FOLDERS = {"train": "training", "val": "validation"}


def jpeg(width: int, height: int, seed: int, **options: Any) -> bytes:
    """A picture of smooth noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def size_of(number: int) -> tuple[int, int]:
    """Width and height of a picture: odd ones among them."""
    return 40 + 7 * (number % 5), 33 + 5 * (number % 4)


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def ade_name(split: str, number: int) -> str:
    return f"ADE_{split}_{number:08d}"


def ade_mask(split: str, number: int) -> np.ndarray:
    """Values as in the source: 0 to the number of classes."""
    width, height = size_of(number)
    seed = number + 1000 * (split == "val")
    return np.random.default_rng(seed).integers(0, len(CLASSES) + 1, (height, width)).astype(np.uint8)


def ade_source(root: Path, train: int = 9, val: int = 3) -> Path:
    """A whole ADEChallengeData2016 in `root`."""
    for split, count in (("train", train), ("val", val)):
        for number in range(1, count + 1):
            name, folder = ade_name(split, number), ADE_FOLDERS[split]
            write(root / "images" / folder / f"{name}.jpg", jpeg(*size_of(number), seed=number))
            write(root / "annotations" / folder / f"{name}.png", png(ade_mask(split, number)))
    rows = [f"{i + 1} \t0.1\t1\t1\t{name}  " for i, name in enumerate(CLASSES)]  # with stray spaces, as published
    write(root / "objectInfo150.txt", "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows, ""]).encode())
    write(root / "sceneCategories.txt", b"ADE_train_00000001 airport_terminal\nADE_val_00000001 bathroom\n")
    return root


def coco_json(annotations: list[dict[str, Any]], images: list[dict[str, Any]]) -> dict[str, Any]:
    categories = [{"id": number, "name": name, "supercategory": ""} for number, name in reversed(CATEGORIES.items())]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def coco_annotation(number: int, image: int, width: int, height: int) -> dict[str, Any]:
    """A polygon, two polygons, or run lengths (every seventh a crowd), by number."""
    rng = np.random.default_rng(number)
    x, y = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
    w, h = rng.uniform(4, width / 2), rng.uniform(4, height / 2)
    box = [x, y, x + w, y, x + w, y + h / 2, x + w / 3, y + h]
    polygons: Any = [box] if number % 3 == 0 else [box, [1, 1, 6.5, 1.5, 3, 7]]
    if number % 3 == 2:
        first = int(rng.integers(0, 20))
        polygons = {"size": [height, width], "counts": [first, 30, width * height - first - 30]}
    return {
        "id": number,
        "image_id": image,
        "category_id": list(CATEGORIES)[number % 3],
        "bbox": [round(float(value), 2) for value in (x, y, w, h)],
        "area": round(float(w * h), 3),
        "iscrowd": int(number % 7 == 0),
        "segmentation": polygons,
    }


def coco_source(root: Path, train: int = 9, val: int = 3) -> Path:
    """A whole COCO in `root`; the last image of each split has no annotation."""
    for split, count in (("train", train), ("val", val)):
        images, annotations = [], []
        for number in range(1, count + 1):
            width, height = size_of(number)
            name = f"{number * 11:012d}.jpg"
            write(root / f"{split}2017" / name, jpeg(width, height, seed=number))
            images.append({"id": number * 11, "file_name": name, "width": width, "height": height})
            for _ in range(0 if number == count else number % 4):
                annotation = coco_annotation(len(annotations) + 1, number * 11, width, height)
                annotations.append(annotation)
        told = coco_json(annotations[::-1], images[::-1])  # in no order
        write(root / "annotations" / f"instances_{split}2017.json", json.dumps(told).encode())
    return root


def edit_json(path: Path, change: Any) -> None:
    """Apply `change` to the parsed content of a JSON file, in place."""
    told = json.loads(path.read_bytes())
    change(told)
    path.write_bytes(json.dumps(told).encode())


def zipped(folder: Path, target: Path, prefix: str) -> Path:
    """The files of a folder as a zip, below `prefix`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{prefix}{file.relative_to(folder)}")
    return target


def samples(folder: Path, manifest: DenseManifest, split: str) -> list[dict[str, Any]]:
    """By the index, as a reader finds them: key, JPEG, parsed JSON and mask."""
    found = []
    for entry in manifest.splits[split].shards:
        index, data = manifest.load_index(folder, entry), (folder / entry.file).read_bytes()
        for i, key in enumerate(index.keys.tolist()):
            part = {
                name: data[offset[i] : offset[i] + size[i]]
                for name, offset, size in (
                    ("jpeg", index.image_offset, index.image_bytes),
                    ("json", index.json_offset, index.json_bytes),
                    ("mask", index.mask_offset, index.mask_bytes),
                )
            }
            with Image.open(io.BytesIO(part["jpeg"])) as image:
                assert image.size == (index.width[i], index.height[i])
            found.append({**part, "key": key, "json": json.loads(part["json"])})
    return found
