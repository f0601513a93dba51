"""Folders of evaluations as `evaluate`, `evaluate-segment` and `evaluate-detect` leave them, made up in a moment."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

_NAMES = ("tabby", "lynx", "red fox", "grey wolf", "sports car", "minivan", "teapot", "coffee mug", "lemon", "orange")
WNIDS = tuple(f"n{2_100_000 + 1_000 * i:08d}" for i in range(len(_NAMES)))


def make_evaluation(run: Path, name: str, step: int, *, seed: int = 0, classes: int = 10) -> Path:
    """`RUN/evaluations/NAME` as pipeline/evaluation/README.md describes it."""
    rng = np.random.default_rng(seed)
    folder = run / "evaluations" / name
    (folder / "pictures").mkdir(parents=True)
    top1 = np.clip(rng.normal(82, 12, classes), 4, 100)
    per_class = [["class", "wnid", "name", "images", "top1_percent", "top5_percent", "confidence", "predicted"]]
    per_class[0] += ["precision_percent", "confused_with_wnid", "confused_with_name", "confused_images"]
    for i in range(classes):
        j = (i ^ 1) % len(_NAMES)
        own = _NAMES[i] if i < len(_NAMES) else f"class {i}"
        scores = [f"{top1[i]:.2f}", f"{min(top1[i] + 11, 100):.2f}", "0.81", 50, f"{top1[i] - 2:.2f}"]
        per_class.append([i, f"n{2_100_000 + 1_000 * i:08d}", own, 50, *scores, WNIDS[j], _NAMES[j], 7])
    text = io.StringIO()
    csv.writer(text).writerows(per_class)
    (folder / "per_class.csv").write_text(text.getvalue())
    bins = [
        {
            "low": i / 15,
            "high": (i + 1) / 15,
            "images": int(40 + 30 * i),
            "confidence": (i + 0.5) / 15,
            "accuracy": min((i + 0.9) / 15, 1),
        }
        for i in range(15)
    ]
    matrix = rng.poisson(1.2, (10, 10)) + np.diag(rng.integers(150, 240, 10))
    matrix[2, 3], matrix[4, 5], matrix[6, 7] = 31, 44, 26
    groups = [
        {"wnid": wnid, "name": name, "classes": 40, "images": 250} for wnid, name in zip(WNIDS, _NAMES, strict=True)
    ]
    pairs = [_pair(folder, i, int(matrix[i, i ^ 1])) for i in (4, 2, 6, 8)]
    samples = [_picture(folder, i, i % 10, (i % 10) ^ (1 if i % 5 == 3 else 0)) for i in range(24)]
    said = {
        "format_version": 1,
        "name": name,
        "created": "2026-11-20T08:30:00+00:00",
        "checkpoint": {
            "path": str(run),
            "run": run.name,
            "step": step,
            "weights": "ema",
            "model": "hornet_large_gf",
            "num_classes": 1000,
        },
        "data": {
            "path": "data/in1k",
            "name": name.rpartition("-")[2],
            "labels": "single",
            "images": 50_000,
            "left_out": 0,
            "classes": classes,
            "unmatched": ["n04399382"],
        },
        "protocol": {
            "resolution": 384,
            "resize": "crop",
            "crop_ratio": 1.0,
            "interpolation": "bicubic",
            "precision": "bf16",
        },
        "results": {
            "top1_percent": round(float(top1.mean()), 3),
            "top5_percent": 97.61,
            "loss": 0.702,
            "tied_top1_percent": 0.0,
            "ece": 0.0312,
            "images": 50_000,
            "ranks": 8,
            "seconds": 92.4,
            "images_per_second": 541.1,
        },
        "reliability": bins,
        "confusion": {"by": "wordnet", "groups": groups, "matrix": matrix.tolist()},
        "worst_pairs": pairs,
        "samples": samples,
    }
    (folder / "evaluation.json").write_text(json.dumps(said))
    return folder


def make_dense_evaluation(run: Path, task: str, step: int) -> Path:
    """`RUN/evaluations/NAME` as `evaluate-segment` or `evaluate-detect` leaves it; the last class is in no image."""
    folder = run / "evaluations" / f"of-{task}"
    folder.mkdir(parents=True)
    classes: list[dict[str, Any]] = []
    for label, name in enumerate(_NAMES):
        score = None if label == 9 else 91.5 - 7 * label
        row: dict[str, Any] = {"label": label, "class": name}
        if task == "segment":
            row |= {"iou_percent": score, "recall_percent": score, "precision_percent": score, "pixels": 1000 * label}
            row |= {"mistaken_for": _NAMES[label ^ 1]}
        else:
            row |= {"annotations": 100 * label, "box_ap_percent": score, "mask_ap_percent": score}
        classes.append(row)
    pictures = []
    for number, score in enumerate((97.5, 3.25), 1):
        Image.new("RGB", (640, 150), (40 * number, 90, 140)).save(folder / f"picture-{number}.jpg", "JPEG")
        seen = {"tabby": "#b1e963", "lynx": "#38169c"}
        told = {"file": f"picture-{number}.jpg", "name": f"image {number}", "score_percent": score, "classes": seen}
        pictures.append(told)
    recall = [point / 100 for point in range(101)]
    precision = {
        f"{kind}_{key}": [1 - point**2 for point in recall] for kind in ("box", "mask") for key in ("ap50", "ap")
    }
    results = {"miou": 63.5, "macc": 71.25, "pixel_accuracy": 88.0, "val_loss": 0.41, "classes_absent": 1.0}
    if task == "detect":
        results = {"box_ap": 41.25, "box_ap50": 60.5, "mask_ap": 37.125}
    said = {
        "format_version": 1,
        "created": "2026-11-21T08:30:00+00:00",
        "checkpoint": {"path": str(run), "step": step, "weights": "ema"},
        "data": {"path": "data/scenes", "name": "scenes", "dataset_id": "5b1d"},
        "protocol": {"short_side_px": 512, "flip": True},
        "results": {**results, "val_samples": 2000.0, "ranks": 8, "seconds": 92.5},
        "classes": classes,
        "pictures": pictures,
        **({"curves": {"recall": recall, **precision}} if task == "detect" else {}),
    }
    (folder / {"segment": "segmentation.json", "detect": "detection.json"}[task]).write_text(json.dumps(said))
    return folder


def _pair(folder: Path, i: int, images: int) -> dict[str, Any]:
    j = i ^ 1
    pictures = [_picture(folder, 100 + 10 * i + k, i, j) for k in range(4)]
    names = {"wnid": WNIDS[i], "name": _NAMES[i], "predicted_wnid": WNIDS[j], "predicted_name": _NAMES[j]}
    return {**names, "images": images, "share_percent": images / 2.5, "pictures": pictures}


def _picture(folder: Path, number: int, truth: int, guess: int) -> dict[str, Any]:
    """A drawing whose hue and shape are its class's."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (160, 120), tuple(int(v) for v in rng.integers(150, 215, 3)))
    draw = ImageDraw.Draw(image)
    hue = np.roll([212, 96, 52], truth) + rng.integers(-20, 20, 3)
    x, y, side = *rng.integers(15, 60, 2).tolist(), int(rng.integers(45, 60))
    (draw.ellipse if truth % 2 else draw.rectangle)(
        (x, y, x + int(1.3 * side), y + side), fill=tuple(int(v) for v in hue)
    )
    file = f"pictures/{number:04d}.jpg"
    image.save(folder / file, "JPEG", quality=80)
    others = [guess, truth ^ 1 if guess == truth else truth, (truth + 3) % 10, (truth + 5) % 10, (truth + 7) % 10]
    shares = (0.62, 0.21, 0.08, 0.04, 0.01)
    predictions = [
        {"wnid": WNIDS[k], "name": _NAMES[k], "probability": share} for k, share in zip(others, shares, strict=True)
    ]
    return {
        "file": file,
        "sample": number,
        "source": None,
        "wnid": WNIDS[truth],
        "name": _NAMES[truth],
        "correct": truth == guess,
        "predictions": predictions,
    }
