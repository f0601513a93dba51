"""`evaluate`, as a program: every image once on any number of ranks, test sets in their published layouts."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchmetrics.functional.classification import multiclass_calibration_error

from data_prep.labels.spaces import TEDDY_BEAR, label_space
from pipeline.__main__ import main
from pipeline.config.load import Config, load
from pipeline.data.augment import evaluation_transform, normalise
from pipeline.data.decode import decode_rgb
from pipeline.evaluation.ranks import start_here
from pipeline.evaluation.result import ResultFolder
from pipeline.ranks.rendezvous import RendezvousError
from pipeline.records.figures import draw_evaluation
from tests.pipeline.evaluation.test_wordnet import write_nouns
from tests.support.checkpoints import write_checkpoint
from tests.support.datasets import SYNSETS_22K, Datasets, drawing
from tests.support.runs import ROOT, launch, run_module

CLOCK = ("seconds", "images_per_second", "ranks")
IN_1K = label_space("imagenet-1k")


def configured(data: Path, *more: str) -> Config:
    options = ("data.resolution=32", "data.workers_per_rank=0", "evaluate.micro_batch=4", *more)
    return load(ROOT / "configs" / "demo_pretrain.yaml", [f"data.path={data}", *options])


def result(run: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "evaluations" / name / "evaluation.json").read_text())
    return content


def classes(run: Path, name: str) -> list[dict[str, str]]:
    with open(run / "evaluations" / name / "per_class.csv", newline="") as file:
        return list(csv.DictReader(file))


def draw(files: dict[str, str]) -> None:
    """Path -> WordNet id that the drawing is of."""
    for seed, (path, wnid) in enumerate(files.items()):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(drawing(wnid, seed))


def logits_by_hand(model: torch.nn.Module, config: Config, files: list[Path]) -> torch.Tensor:
    transform = evaluation_transform(config.evaluate, config.data.resolution)
    images = [np.asarray(transform(Image.fromarray(decode_rgb(file.read_bytes())))) for file in files]
    with torch.inference_mode():
        logits: torch.Tensor = model(normalise(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)))
    return logits


def test_ranks_and_launcher(datasets: Datasets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    write_checkpoint(run, configured(datasets.in22k), SYNSETS_22K)
    write_nouns(tmp_path)
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    done = run_module("pipeline", "evaluate", str(run))
    assert done.returncode == 0, done.stderr
    name = "step-00000001-ema-in22k"
    assert done.stdout.rstrip().endswith(f"evaluations/{name}")
    alone = result(run, name)
    assert alone["results"]["images"] == 28
    assert alone["results"]["images_per_second"] > 0
    assert sum(map(sum, alone["confusion"]["matrix"])) == 28
    assert alone["confusion"]["by"] == "wordnet"
    assert {group["name"] for group in alone["confusion"]["groups"]} > {"cat", "dog", "car"}
    assert sum(each["images"] for each in alone["reliability"]) == 28
    gaps = [
        each["images"] * abs(each["confidence"] - each["accuracy"]) for each in alone["reliability"] if each["images"]
    ]
    assert alone["results"]["ece"] == pytest.approx(sum(gaps) / 28, abs=1e-6)
    rows = classes(run, name)
    assert [row["wnid"] for row in rows] == list(SYNSETS_22K)
    assert sum(int(row["images"]) for row in rows) == sum(int(row["predicted"]) for row in rows) == 28
    wrong = sum(pair["images"] for pair in alone["worst_pairs"])
    assert wrong == 28 - round(28 * alone["results"]["top1_percent"] / 100)
    pictures = [each["pictures"] for each in alone["worst_pairs"]] + [alone["samples"]]
    for picture in (each for some in pictures for each in some):
        with Image.open(run / "evaluations" / name / picture["file"]) as image:
            assert (image.format, max(image.size)) == ("JPEG", 48)

    spread = run_module("pipeline", "evaluate", str(run), "--ranks", "3", "--name", "three")
    assert spread.returncode == 0, spread.stderr
    assert spread.stdout.count("top-1 %") == 1
    launched = launch("evaluate", str(run), "--name", "launched")
    assert launched.returncode == 0, launched.stderr
    for other, ranks in (("three", 3), ("launched", 2)):
        content = result(run, other)
        assert content["results"]["ranks"] == ranks
        for key in ("loss", "ece"):
            assert content["results"].pop(key) == pytest.approx(alone["results"][key], abs=1e-5)
        left = {key: value for key, value in alone["results"].items() if key not in (*CLOCK, "loss", "ece")}
        assert {key: value for key, value in content["results"].items() if key not in CLOCK} == left
        assert content["confusion"] == alone["confusion"]
        assert [row["images"] for row in classes(run, other)] == [row["images"] for row in rows]

    monkeypatch.setenv("HOSTFILE", "hosts")
    refused = launch("evaluate", str(run))
    assert (refused.returncode, refused.stderr) == (1, "error: evaluate runs on one host: leave HOSTFILE out\n")

    raw = run_module("pipeline", "evaluate", str(run), "--weights", "raw")
    assert raw.returncode == 0, raw.stderr
    assert result(run, name.replace("ema", "raw"))["results"]["loss"] != alone["results"]["loss"]
    assert not list((run / "evaluations").glob(".*"))


@pytest.fixture(scope="module")
def run_1k(tmp_path_factory: pytest.TempPathFactory, datasets: Datasets) -> tuple[Path, Config, torch.nn.Module]:
    """A head over ImageNet-1K in another order than the data's."""
    run = tmp_path_factory.mktemp("runs") / "run"
    config = configured(datasets.in22k)
    return run, config, write_checkpoint(run, config, list(reversed(IN_1K)))


def test_class_numbers_are_numbers(run_1k: Any, tmp_path: Path) -> None:
    """ImageNet-V2 as it comes: folder 10 is class 10, though by name it comes before 2."""
    run, config, model = run_1k
    root = tmp_path / "imagenetv2-données"  # a name that no result folder has, but for --name
    files = {
        f"{root}/{number}/{i}.jpeg": IN_1K[number] for number, some in ((2, 1), (10, 3), (999, 2)) for i in range(some)
    }
    draw(files)
    assert main(["evaluate", str(run), "--data", str(root)]) == 0
    name = "step-00000001-ema-imagenetv2-donn-es"
    assert {int(row["class"]): int(row["images"]) for row in classes(run, name) if row["images"] != "0"} == {
        2: 1,
        10: 3,
        999: 2,
    }
    found = result(run, name)
    assert (found["data"]["classes"], found["data"]["name"], found["data"]["dataset_id"]) == (1000, root.name, None)
    logits = logits_by_hand(model, config, [Path(file) for file in files]).flip(1)  # of the head, in the data's order
    labels = torch.tensor([IN_1K.index(wnid) for wnid in files.values()])
    assert found["results"]["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-4)
    ece = multiclass_calibration_error(logits, labels, num_classes=1000, n_bins=15)
    assert found["results"]["ece"] == pytest.approx(float(ece), abs=1e-5)


def test_only_the_classes_of_the_set_are_predicted(run_1k: Any, tmp_path: Path) -> None:
    """ImageNet-A: 200 classes. A part of its folders, or of ImageNet-1K's, is scored among 1,000."""
    run, config, model = run_1k
    in_a = label_space("imagenet-a")
    draw({f"{tmp_path}/imagenet-a/{wnid}/0.jpg": wnid for wnid in in_a})
    (tmp_path / "imagenet-a" / "README.txt").write_text("as it comes")
    assert main(["evaluate", str(run), "--data", str(tmp_path / "imagenet-a"), "--name", "a"]) == 0
    found = result(run, "a")
    assert (found["data"]["classes"], found["results"]["images"]) == (200, 200)
    logits = logits_by_hand(model, config, [tmp_path / "imagenet-a" / wnid / "0.jpg" for wnid in in_a])
    columns = [1000 - 1 - IN_1K.index(wnid) for wnid in in_a]
    hits = logits[:, columns].argmax(1) == torch.arange(200)
    assert found["results"]["top1_percent"] == pytest.approx(100 * float(hits.float().mean()))
    assert {each["wnid"] for picture in found["samples"] for each in picture["predictions"]} <= set(in_a)
    draw({f"{tmp_path}/part/val/{wnid}/0.png": wnid for wnid in in_a[:2]})
    assert main(["evaluate", str(run), "--data", str(tmp_path / "part"), "--resolution", "384"]) == 0
    part = result(run, "step-00000001-ema-part-384px")  # beside one at the run's own resolution
    assert (part["data"]["classes"], part["data"]["name"]) == (1000, "part")
    protocol = {key: part["protocol"][key] for key in ("resolution", "resize", "crop_ratio")}
    assert protocol == {"resolution": 384, "resize": "warp", "crop_ratio": 1.0}


def test_real(run_1k: Any, tmp_path: Path) -> None:
    """ReaL on the flat folder that ImageNet's tar makes: images without labels are left out of the mean."""
    run, config, model = run_1k
    labels = {1: [], 2: [970, 795], 3: [230, 231], 4: [809], 17: [327, 108]}  # as published
    files = {f"{tmp_path}/val/ILSVRC2012_val_{number:08d}.JPEG": IN_1K[number] for number in labels}
    draw(files)
    assert main(["evaluate", str(run), "--data", str(tmp_path), "--real", "--name", "real"]) == 0
    found = result(run, "real")
    assert (found["data"]["images"], found["data"]["left_out"], found["results"]["images"]) == (4, 1, 4)
    assert found["results"]["loss"] is None
    order = logits_by_hand(model, config, [Path(file) for file in files]).flip(1).argsort(1, descending=True)
    for k in (1, 5):
        hits = [
            bool(set(row[:k].tolist()) & set(each)) for row, each in zip(order, labels.values(), strict=True) if each
        ]
        assert found["results"][f"top{k}_percent"] == pytest.approx(100 * np.mean(hits))
    shown = {picture["sample"]: picture for picture in found["samples"]}
    assert sorted(shown) == [1, 2, 3, 4]
    assert shown[1]["wnid"] is None
    assert shown[1]["name"].count(", ") == 1
    # Every image that can be has each of its labels tried: a file that says the model is right makes it right.
    mine = [[int(row[0])] for row in order]
    table: list[list[int]] = [[]] * 50_000
    for number, best in zip(labels, mine, strict=True):
        table[number - 1] = [*best, 0]
    (tmp_path / "real.json").write_text(json.dumps(table))
    assert (
        main(["evaluate", str(run), "--data", str(tmp_path), f"--real={tmp_path / 'real.json'}", "--name", "mine"]) == 0
    )
    assert result(run, "mine")["results"]["top1_percent"] == 100


def test_a_22k_head_on_1k(datasets: Datasets, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fall11 lacks one class of ImageNet-1K: it is named, and its images count as wrong."""
    write_checkpoint(tmp_path / "run", configured(datasets.in22k), label_space("fall11"))
    draw({f"{tmp_path}/imagenet/val/{wnid}/{i}.JPEG": wnid for wnid in (TEDDY_BEAR, IN_1K[0]) for i in range(2)})
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "imagenet"), "--name", "x"]) == 0
    assert f"the head lacks {TEDDY_BEAR} (teddy" in capsys.readouterr().out
    found = result(tmp_path / "run", "x")
    assert found["data"]["unmatched"] == [TEDDY_BEAR]
    assert found["results"]["loss"] is not None
    rows = {row["wnid"]: row for row in classes(tmp_path / "run", "x")}
    assert (rows[TEDDY_BEAR]["images"], rows[TEDDY_BEAR]["top5_percent"], rows[TEDDY_BEAR]["predicted"]) == (
        "2",
        "0",
        "0",
    )
    assert {each["wnid"] for picture in found["samples"] for each in picture["predictions"]} <= set(IN_1K)


def test_what_is_not_finished_is_not_left(
    run_1k: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither by a time limit's SIGTERM nor on a full disk, where the figures are told all the same."""
    run, _, _ = run_1k
    draw({f"{tmp_path}/set/{IN_1K[0]}/0.png": IN_1K[0]})
    asked = ["evaluate", str(run), "--data", str(tmp_path / "set"), "--out", str(tmp_path / "out")]

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def told_to_stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ResultFolder, "write", full)
        assert main(asked) == 1
    out, err = capsys.readouterr()
    assert "top-1 %" in out
    assert "evaluations/step-00000001-ema-set cannot be written: No space left on device" in err
    former = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ResultFolder, "write", told_to_stop)
    with pytest.raises(SystemExit, match="143"):
        main(asked)
    assert signal.getsignal(signal.SIGTERM) == former
    assert list((tmp_path / "out" / "evaluations").iterdir()) == []


def test_a_rank_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, for memory: it says nothing, so what started it does, and at once."""
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$RANK" = 1 ] && kill -9 $$\nexec sleep 60\n')
    (tmp_path / "python").chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    started = time.monotonic()
    with pytest.raises(RendezvousError, match="rank 1 was ended by SIGKILL"):
        start_here(["evaluate", "run"], 2)
    assert time.monotonic() - started < 30  # the other one was not waited for


def test_a_net_that_gives_no_numbers(datasets: Datasets, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured as any other: no image is a hit, and what has no number is null, also in the drawing for MLflow."""
    run = tmp_path / "run"
    write_checkpoint(run, configured(datasets.in22k), SYNSETS_22K)
    for file in run.rglob("*.safetensors"):
        weights = load_file(file)
        weights["head.bias"].fill_(math.nan)
        save_file(weights, file)
    assert main(["evaluate", str(run), "--name", "nan"]) == 0
    assert "ECE -, among" in capsys.readouterr().out
    found = result(run, "nan")
    assert (found["results"]["top1_percent"], found["results"]["loss"], found["results"]["ece"]) == (0, None, None)
    assert {each["probability"] for picture in found["samples"] for each in picture["predictions"]} == {None}
    assert all(file.stat().st_size for file in draw_evaluation(found, tmp_path))


def test_mistakes_are_one_line(
    run_1k: Any,
    datasets: Datasets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _, _ = run_1k
    draw({f"{tmp_path}/flat/ILSVRC2012_val_00000002.JPEG": IN_1K[0], f"{tmp_path}/odd/dogs/1.jpg": IN_1K[0]})
    draw({f"{tmp_path}/numbers/{number}/1.jpg": IN_1K[0] for number in (2, 10, 1000)})
    draw({f"{tmp_path}/other/n00000001/1.jpg": IN_1K[0], f"{tmp_path}/damaged/{IN_1K[0]}/1.jpg": IN_1K[0]})
    (tmp_path / "damaged" / IN_1K[0] / "2.jpg").write_bytes(b"no image")
    (tmp_path / "file").write_text("")
    (tmp_path / "wordnet").mkdir()
    (tmp_path / "wordnet" / "data.noun").write_text("00001740 03\n")
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path / "wordnet"))
    assert main(["evaluate", str(run)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "data.noun is not WordNet's" in said
    assert said.count("\n") == 1
    monkeypatch.delenv("WNSEARCHDIR")
    told = {
        ("--data", f"{tmp_path}/flat"): "without their labels",
        ("--data", f"{tmp_path}/odd"): "holds the folder dogs, which is no class",
        ("--data", f"{tmp_path}/numbers"): "holds the folder 1000, which is no class",
        ("--data", f"{tmp_path}/flat", "--real", "--name", "n" * 250): "at most 200 letters",
        ("--data", f"{tmp_path}/flat", "--real", "--check", "--name", "a b"): "cannot be a folder's name",
        ("--data", f"{tmp_path}/other"): "none of them is among the 1,000",
        ("--data", f"{tmp_path}/damaged"): "2.jpg does not decode",
        ("--data", str(datasets.in22k), "--real"): "ReaL has labels for ILSVRC2012_val_",
        ("--data", f"{tmp_path}/flat", "--real", f"{tmp_path}/file"): "is not ReaL's real.json",
        ("--data", f"{tmp_path}/flat", "--real", "--out", f"{tmp_path}/file"): "cannot be written",
        ("--data", f"{tmp_path}/flat", "--real", "--name", "../x"): "cannot be a folder's name",
        ("--resolution", "100"): "it is a multiple of 32",
    }
    for options, text in told.items():
        assert main(["evaluate", str(run), *options]) == 1, options
        said = [line for line in capsys.readouterr().err.splitlines() if "image/s" not in line and line.strip()]
        assert len(said) == 1, said
        assert text in said[0]
    assert not [path for path in (run / "evaluations").iterdir() if path.name.startswith(".")]
