"""Run folders as training leaves them, made up in a moment: of any length, with every fault."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.support.made_up_evaluations import make_evaluation

BEGAN = 1_700_000_000.0
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
