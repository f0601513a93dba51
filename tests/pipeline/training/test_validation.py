"""Training without validation images: asked for, it is said and done; else it is refused before a start."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.manifest import MANIFEST_NAME, Manifest
from tests.support.datasets import Datasets
from tests.support.runs import run_module, small_run


def without_validation(datasets: Datasets, folder: Path, empty: bool) -> Path:
    """The small set with a split of no images, or with none: what `index` makes of tars of training images."""
    folder.mkdir()
    tree: dict[str, Any] = Manifest.load(datasets.in22k).model_dump(mode="json")
    if empty:
        tree["splits"]["val"] = {"samples": 0, "class_counts": [0] * len(tree["synsets"]), "shards": []}
    else:
        del tree["splits"]["val"]
    (folder / MANIFEST_NAME).write_text(json.dumps(tree))
    for file in datasets.in22k.glob("train-*"):
        os.link(file, folder / file.name)
    return folder


@pytest.mark.parametrize("empty", [True, False])
def test_no_validation_images(datasets: Datasets, tmp_path: Path, empty: bool) -> None:
    data = without_validation(datasets, tmp_path / "set", empty)
    run = small_run(datasets, tmp_path, f"data.path={data}", "train.epochs=1", "checkpoint.best_metric=null")
    refused = run_module("pipeline", *run, "--check")
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: {data} has no validation images: set evaluate.every_epochs=null")
    assert refused.stderr.count("\n") == 1
    if empty:  # once is enough
        return
    done = run_module("pipeline", *run, "evaluate.every_epochs=null")
    assert done.returncode == 0, done.stderr
    assert "none (evaluate.every_epochs is null)" in done.stdout
    assert "top-1" not in done.stdout
    folder = tmp_path / "demo-pretrain"
    assert not {"top1", "val_loss", "val_samples"} & json.loads((folder / "summary.json").read_text()).keys()
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all("loss" in line and "top1" not in line for line in logged)
    looked = run_module("pipeline", "checkpoint", str(folder))
    assert looked.returncode == 0, looked.stderr
    measured = run_module("pipeline", "evaluate", str(folder))
    assert (measured.returncode, measured.stdout) == (1, "")
    assert measured.stderr == f"error: {data} has no validation images: give another data set with --data\n"
    elsewhere = run_module("pipeline", "evaluate", str(folder), "--data", str(datasets.in22k))
    assert elsewhere.returncode == 0, elsewhere.stderr
