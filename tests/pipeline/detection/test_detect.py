"""`detect` for real: DeepSpeed on two gloo ranks, stopped and gone on; from a pretrained backbone; what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.config.detect import DetectConfig
from pipeline.config.load import load
from pipeline.models.build import build_model
from tests.support.dense_sets import CLASSES, build_instances, build_semantic
from tests.support.jobs import Recorded, launch_jobs
from tests.support.runs import launch, run_module

CONFIG = "configs/demo_detect.yaml"
STEPS, STOP = 6, 2  # of two epochs of three; in the midst of the first
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_instances(tmp_path_factory.mktemp("instances"))


def small(boxes: Path, root: Path, *more: str) -> list[str]:
    """Arguments of a run of seconds, with accumulation, drop path, layer decay and an EMA."""
    return [
        "detect",
        CONFIG,
        *(f"data.path={boxes}", f"output_root={root}", "data.resolution=64", "init.checkpoint=null"),
        *(
            "evaluate.short_side_px=64",
            "model.channels=16",
            "model.head_channels=32",
            "model.sampled=32",
            "train.epochs=2",
        ),
        *("train.global_batch=12", "train.micro_batch=3", "optimizer.warmup_epochs=0.5", "evaluate.every_epochs=2"),
        *("model.drop_path_rate=0.2", "optimizer.layer_decay=0.8", "checkpoint.every_steps=100"),
        *more,
    ]


def test_a_stopped_run_goes_on_bit_by_bit(boxes: Path, tmp_path: Path) -> None:
    """The same losses and weights, each sample once an epoch, one evaluation, each image once; each kind of head."""
    boxes_alone = "model.masks=false"
    stages = {
        "masks-1": ("train.zero_stage=1",),
        "cascade-3": ("model.head=cascade-mask-rcnn", boxes_alone, "train.zero_stage=3"),
        "set-2": ("model.head=rt-detr-v2", "model.queries=20", boxes_alone, "train.zero_stage=2"),
    }

    def jobs(name: str, **fate: object) -> list[dict]:
        more = {stage: (*options, f"name={name}-{stage}") for stage, options in stages.items()}
        return [{"arguments": small(boxes, tmp_path, *options), **fate} for options in more.values()]

    launch_jobs(2, tmp_path, jobs("whole") + jobs("cut", stop_at=STOP))
    launch_jobs(2, tmp_path, jobs("cut"))
    runs = Recorded(tmp_path)
    for stage in stages:
        whole, cut = runs.lines(f"whole-{stage}"), runs.lines(f"cut-{stage}")
        assert [line.exact for line in cut] == [line.exact for line in whole]
        assert len(whole) == STEPS
        for epoch in (whole[:3], whole[3:]):
            samples = [sample for line in epoch for sample in line.samples]
            assert len(set(samples)) == len(samples) == 36
        assert runs.bit_equal(f"cut-{stage}", f"whole-{stage}", STEPS)
        metrics = [
            json.loads((runs.folder(f"{name}-{stage}", STEPS) / "checkpoint.json").read_text())["metrics"]
            for name in ("whole", "cut")
        ]
        assert metrics[0] == metrics[1]
        assert metrics[0]["val_samples"] == 7
        assert {"box_ap", "box_ap50", "box_ap75", "box_ap_model"} <= metrics[0].keys()
        assert ("mask_ap" in metrics[0]) == (stage == "masks-1")


def test_from_a_backbone_and_measured_again(boxes: Path, tmp_path: Path) -> None:
    """Under the launcher; what it found is the same measured by one rank and by two; what looks at runs knows it."""
    config = load(CONFIG, [f"data.path={boxes}"], DetectConfig)
    torch.manual_seed(5)
    backbone = build_model(config.model, 7, 64)
    torch.save({"model": backbone.state_dict()}, tmp_path / "backbone.pth")
    more = ("name=run", f"init.checkpoint={tmp_path / 'backbone.pth'}", "data.workers_per_rank=1")
    done = launch(*small(boxes, tmp_path, *more, "model.drop_path_rate=0", "optimizer.ema_decay=0.5"))
    assert done.returncode == 0, done.stderr
    assert f"backbone: weights from {tmp_path / 'backbone.pth'}" in done.stdout
    assert "head: fresh" in done.stdout
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_samples"] == 7
    rows = list(csv.DictReader((run / "classes.csv").read_text().splitlines()))
    assert {row["class"] for row in rows} == set(CLASSES[1:])
    assert [float(row["box_ap"]) for row in rows] == sorted(float(row["box_ap"]) for row in rows)
    assert [int(row["annotations"]) for row in rows] == [6, 6]
    assert sum(float(row["box_ap"]) for row in rows) / 2 == pytest.approx(summary["box_ap"], abs=0.01)

    for extra in (["--name", "alone"], ["--ranks", "2", "--name", "two"]):
        done = run_module("pipeline", "evaluate-detect", str(run), *extra)
        assert done.returncode == 0, done.stderr
    found = {path.parent.name: json.loads(path.read_text()) for path in run.glob("evaluations/*/detection.json")}
    for name in ("alone", "two"):
        for key in ("box_ap", "box_ap50", "box_ap75", "val_samples"):
            assert found[name]["results"][key] == pytest.approx(summary[key], abs=1e-4)
    assert found["alone"]["classes"] == found["two"]["classes"]
    assert 100 * sum(found["two"]["curves"]["box_ap"]) / 101 == pytest.approx(summary["box_ap"], abs=1e-2)
    files = {"per_class.csv", "per_class.png", "best_and_worst.png", "precision_recall.png", "detection.json"}
    files |= {f"picture-{number}.jpg" for number in range(1, 7)}  # one of seven images has no objects
    assert {path.name for path in (run / "evaluations" / "two").iterdir()} == files

    done = run_module("pipeline", "export", str(run), "--to", "timm")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "is of a run that learned to detect" in done.stderr
    done = run_module("pipeline", "review", str(run), "--html", str(tmp_path / "page.html"), COLUMNS="200")
    assert "box AP" in done.stdout, done.stdout + done.stderr
    assert f"{summary['box_ap']:.2f}" in done.stdout
    done = run_module("pipeline", "checkpoint", str(run), COLUMNS="200")
    assert "box AP %" in done.stdout
    assert f"{summary['box_ap']:.2f}" in done.stdout


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["data.resolution=100"], ["data.resolution 100 is not a multiple of 32", "nearest: 96"]),
        (["model.head=d-fine"], ["model.masks is true, and model.head d-fine finds boxes alone: set it to false"]),
        (
            ["model.head=d-fine", "model.masks=false", "train.zero_stage=3"],
            ["train.zero_stage 3 does not go with model.head d-fine: set 2 or less"],
        ),
        (["checkpoint.best_metric=miou"], ["checkpoint.best_metric miou is of another task: set box_ap"]),
        (["augment.scale_min=3"], ["augment.scale_min 3 is above augment.scale_max 1.5"]),
        (["train.global_batch=60"], ["40 training samples do not fill one global batch of 60"]),
        (["augment.class_share_max=1"], ["no key 'augment.class_share_max'"]),
        (["model.channels=7"], ["model.channels 7 is odd, and horfpn's gnConvs halve it"]),
        (["evaluate.short_side_px=500"], ["evaluate.short_side_px 500 is above evaluate.long_side_max_px 256"]),
        (["data.path=s3://bucket/x"], ["s3://bucket/x: sets with masks are read from local folders"]),
    ],
)
def test_refused_before_anything_starts(boxes: Path, tmp_path: Path, more: list[str], told: list[str]) -> None:
    done = run_module("pipeline", *small(boxes, tmp_path, *more), "--check", "--ranks", "2")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert all(text in done.stderr for text in told), done.stderr


def test_other_sets_and_configurations(boxes: Path, tmp_path: Path) -> None:
    """Each command says of which the other's file is, and what the other's set is for."""
    squares = build_semantic(tmp_path)
    done = run_module("pipeline", *small(boxes, tmp_path, f"data.path={squares}"), "--check")
    assert "has masks of classes: `detect` takes a set with objects" in done.stderr
    done = run_module("pipeline", "segment", "configs/demo_segment.yaml", f"data.path={boxes}", "--check")
    assert "has objects: `segment` takes a set with masks of classes" in done.stderr
    for command in ("pretrain", "segment"):
        done = run_module("pipeline", command, CONFIG)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert "demo_detect.yaml is the configuration of `task: detect`" in done.stderr


def test_doctor_looks_at_its_data(boxes: Path, tmp_path: Path) -> None:
    command, config, *overrides = small(boxes, tmp_path)
    assert command == "detect"
    done = run_module("pipeline", "doctor", config, *overrides, "--fast", "--json")
    findings = {each["check"]: each for each in json.loads(done.stdout)["findings"]}
    assert (done.returncode, findings["data"]["status"]) == (0, "pass"), done.stdout
    short = tmp_path / "short"
    shutil.copytree(boxes, short)
    (short / "val-000000.tar").write_bytes(b"")
    done = run_module("pipeline", "doctor", config, *overrides, f"data.path={short}", "--fast", "--json")
    findings = {each["check"]: each for each in json.loads(done.stdout)["findings"]}
    assert (done.returncode, findings["shards"]["status"]) == (1, "fail")
    assert "val-000000.tar has 0 bytes" in findings["shards"]["text"]
