"""Run folders as training, `evaluate` and the rest leave them, made up in a moment: of any length, with every fault."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

BEGAN = 1_700_000_000.0
_NAMES = ("tabby", "lynx", "red fox", "grey wolf", "sports car", "minivan", "teapot", "coffee mug", "lemon", "orange")
WNIDS = tuple(f"n{2_100_000 + 1_000 * i:08d}" for i in range(len(_NAMES)))
_GLOBAL_BATCH = 4096


def make_run(
    root: Path,
    name: str,
    *,
    steps: int = 2000,
    seed: int = 0,
    lr: float = 4e-3,
    model: str = "hornet_large_gf",
    init: str | None = None,
    faults: bool = False,
    done: float = 1.0,
    dataset: str = "in22k",
) -> Path:
    """One run of `steps`, of which the part `done` is logged; with `faults`: stops, steps left out, a NaN."""
    rng = np.random.default_rng(seed)
    folder = root / name
    folder.mkdir(parents=True)
    config = {
        "name": name,
        "seed": seed,
        "output_root": str(root),
        "data": {"path": f"data/{dataset}", "format": "webdataset", "resolution": 384 if init else 224},
        "augment": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
        "model": {"name": model, "drop_path_rate": 0.4 if init else 0.2},
        "optimizer": {"lr_peak": lr, "ema_decay": 0.9999, "layer_decay": 0.8 if init else None},
        "train": {"epochs": steps // 50, "global_batch": _GLOBAL_BATCH, "zero_stage": 1},
        "init": {"checkpoint": init, "weights": "ema"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "dataset.json").write_text(json.dumps(_manifest(dataset)))
    lines, events = _log(rng, steps, round(steps * done), lr, config["train"]["epochs"], faults, seed)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "events.txt").write_text("".join(f"{event}\n" for event in events))
    top1 = next(line["top1"] for line in reversed(lines) if "top1" in line)
    for step, link in ((steps // 2, None), (round(steps * done), "latest")):
        _checkpoint(folder / "checkpoints", step, top1, link)
    if done == 1.0:
        summary = {"name": name, "stage": "finetune" if init else "pretrain", "top1": top1}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _manifest(name: str) -> dict[str, Any]:
    count = 1000 if name == "in1k" else 21_841
    train, val = (1_281_167, 50_000) if name == "in1k" else (13_153_500, 1_092_050)
    file = "ILSVRC2012_img_train.tar" if name == "in1k" else "winter21_whole.tar.gz"
    return {
        "dataset_id": f"{'5b1d' if name == 'in1k' else 'ce91'}26ae41928015a5f5eda2479a4dc5",
        "name": name,
        "synsets": [f"n{i:08d}" for i in range(count)],
        "splits": {"train": {"samples": train}, "val": {"samples": val}},
        "settings": {"source": {"file": file, "fingerprint": "3ccbbb23dd27", "kind": "tar-of-tars"}},
    }


def _log(
    rng: np.random.Generator, steps: int, done: int, lr: float, epochs: int, faults: bool, seed: int
) -> tuple[list[dict[str, float]], list[str]]:
    lines, events, clock = [], [], BEGAN + 7200 * seed
    every, speed = max(steps // 10, 1), 9000 + 600 * rng.random()
    stamp = lambda: time.strftime("%Y-%m-%d %H:%M:%S +0000", time.gmtime(clock))  # noqa: E731
    noise, spikes = rng.standard_normal((done, 3)), rng.random(done)
    skipped = 0
    for step in range(1, done + 1):
        share = step / steps
        slow = 0.55 if 0.62 < share < 0.66 and seed % 3 == 0 else 1.0
        loss = (
            2.1
            + 7.8 * math.exp(-share * (7 + seed % 4))
            + 0.06 * noise[step - 1, 0]
            + 0.3 * (seed % 5) * (1 - share) / 5
        )
        if faults and step in (done // 3, done // 3 + 1):
            skipped += 1
            loss = math.nan
            reason = "the loss is not finite" if skipped == 1 else "the gradient's norm 5.1e+02 is far above 4.2"
            events.append(f"{stamp()}  step {step}  LEFT OUT: {reason}  worst: rank 3 micro-batch 1, samples 81, 4410")
        if faults and step in (done // 2, done * 3 // 4):
            events.append(f"{stamp()}  step {step - 1}  stopped (SIGTERM) with {steps - step} of {steps} steps to go")
            clock += 3600.0 * steps / 1500
            events.append(f"{stamp()}  step {step - 1}  RESUMED from step-{step - 1:08d} on 64 ranks")
            clock += 40.0
        images_per_second = float(speed * slow * (1 + 0.03 * noise[step - 1, 1]))
        clock += _GLOBAL_BATCH / images_per_second
        record = {
            "time": round(clock, 3),
            "step": step,
            "loss": _round(loss),
            "samples_seen": float(step * _GLOBAL_BATCH),
            "images_per_second": _round(images_per_second),
            "data_wait": _round(abs(0.012 * noise[step - 1, 2]) + (0.4 if slow < 1 else 0.0)),
            "data_wait_max": _round(abs(0.02 * noise[step - 1, 2]) + (0.45 if slow < 1 else 0.0)),
            "bad_samples": 0.0,
            "memory_gb": _round(61.2 + 0.4 * spikes[step - 1]),
            "epoch": _round(epochs * share),
            "lr": _round(lr * min(share / 0.05, 0.5 * (1 + math.cos(math.pi * share)))),
            "grad_norm": _round(
                1.4 + 5 * math.exp(-8 * share) + 0.2 * abs(noise[step - 1, 1]) + (spikes[step - 1] > 0.9995) * 9
            ),
            "ema_decay": 0.9999,
            "skipped_steps": float(skipped),
            "rewinds": 0.0,
            "checkpoints_failed": 0.0,
            "checkpoint_stall": _round(1.2 * spikes[step - 1]),
        }
        lines.append(record)
        if step % every == 0 or step == done:
            clock += 10.0
            top1 = 100 * (0.845 - 0.75 * math.exp(-4.5 * share) - 0.004 * (seed % 5)) + 0.1 * noise[step - 1, 2]
            scores = {"top1": _round(top1), "top5": _round(min(top1 + 12, 99)), "top1_model": _round(top1 - 0.8)}
            lines.append(
                {"time": round(clock, 3), "step": step, **scores, "val_loss": _round(loss if loss == loss else 3.0)}
            )
    return lines, events


def _round(value: float) -> float:
    return float(f"{value:.7g}")


def _checkpoint(folder: Path, step: int, top1: float, link: str | None) -> None:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    meta = {
        "step": step,
        "updates": step - 2,
        "metrics": {"top1": top1},
        "files": {"model.safetensors": {"bytes": 783_000_000}},
    }
    (path / "checkpoint.json").write_text(json.dumps(meta))
    if link:
        (folder / link).symlink_to(path.name)


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


def make_chain(root: Path) -> list[Path]:
    """Five runs: three pretrainings, one with faults and one under way, and two fine-tunings, with evaluations."""
    best = make_run(root, "pretrain-l-gf", steps=3000, seed=1)
    make_run(root, "pretrain-l-gf-lr2e-3", steps=3000, seed=3, lr=2e-3, faults=True)
    make_run(root, "pretrain-l-7x7", steps=3000, seed=4, model="hornet_large", done=0.6)
    tuned = make_run(root, "finetune-l-gf-384", steps=1200, seed=6, lr=5e-5, init=str(best), dataset="in1k")
    make_run(root, "finetune-l-gf-384-lr1e-4", steps=1200, seed=8, lr=1e-4, init=str(best), dataset="in1k")
    make_evaluation(best, "step-00003000-ema-in22k", 3000, classes=600)
    make_evaluation(tuned, "step-00001200-ema-in1k-v2", 1200, seed=2)
    make_evaluation(tuned, "step-00001200-ema-in1k", 1200, seed=1)
    (tuned / "exports" / "timm").mkdir(parents=True)
    (tuned / "exports" / "timm" / "config.json").write_text("{}")
    return sorted(path for path in root.iterdir() if path.is_dir())
