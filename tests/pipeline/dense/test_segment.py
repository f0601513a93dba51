"""`segment` for real: DeepSpeed on two gloo ranks, killed and gone on; from a pretrained backbone; what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.dense import SegmentConfig
from pipeline.config.load import load
from pipeline.models.build import build_model
from tests.support.dense_sets import CLASSES, build_semantic
from tests.support.jobs import Recorded, launch_jobs
from tests.support.runs import launch, run_module

CONFIG = "configs/demo_segment.yaml"
STEPS, STOP = 10, 4  # of two epochs of five; in the midst of the first
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_semantic(tmp_path_factory.mktemp("dense"))


def small(squares: Path, root: Path, *more: str) -> list[str]:
    """Arguments of a run of seconds, with accumulation, drop path, layer decay and an EMA."""
    return [
        "segment",
        CONFIG,
        *(f"data.path={squares}", f"output_root={root}", "data.resolution=64", "init.checkpoint=null"),
        *("augment.short_side_px=64", "evaluate.short_side_px=64", "model.head_channels=16", "train.epochs=2"),
        *("train.global_batch=8", "train.micro_batch=2", "optimizer.warmup_epochs=0.5", "evaluate.every_epochs=2"),
        *("model.drop_path_rate=0.2", "optimizer.layer_decay=0.8", "checkpoint.every_steps=100"),
        *more,
    ]


def test_a_stopped_run_goes_on_bit_by_bit(squares: Path, tmp_path: Path) -> None:
    """The same losses and weights, each sample once an epoch, one evaluation; also for masks read by workers."""
    queries = ("model.head=mask2former", "model.head_channels=32", "model.auxiliary_weight=0", "train.zero_stage=2")
    stages = {
        "uper-1": ("model.head=uper", "train.zero_stage=1"),
        "gn-3": ("train.zero_stage=3",),
        "queries-2": queries,
    }

    def jobs(name: str, **fate: object) -> list[dict]:
        more = {stage: (*options, f"name={name}-{stage}") for stage, options in stages.items()}
        return [{"arguments": small(squares, tmp_path, *options), **fate} for options in more.values()]

    launch_jobs(2, tmp_path, jobs("whole") + jobs("cut", stop_at=STOP))
    launch_jobs(2, tmp_path, jobs("cut"))
    runs = Recorded(tmp_path)
    for stage in stages:
        whole, cut = runs.lines(f"whole-{stage}"), runs.lines(f"cut-{stage}")
        assert [line.exact for line in cut] == [line.exact for line in whole]
        assert len(whole) == STEPS
        for epoch in (whole[:5], whole[5:]):
            assert sorted(sample for line in epoch for sample in line.samples) == list(range(40))
        assert runs.bit_equal(f"cut-{stage}", f"whole-{stage}", STEPS)
        metrics = [
            json.loads((runs.folder(f"{name}-{stage}", STEPS) / "checkpoint.json").read_text())["metrics"]
            for name in ("whole", "cut")
        ]
        assert metrics[0] == metrics[1]
        assert metrics[0]["val_samples"] == 7
        assert {"miou", "miou_model", "macc", "pixel_accuracy"} <= metrics[0].keys()


def test_learns_under_the_launcher_from_a_backbone(squares: Path, tmp_path: Path) -> None:
    config = load(CONFIG, [f"data.path={squares}"], SegmentConfig)
    torch.manual_seed(5)
    backbone = build_model(config.model, 7, 64)
    torch.save({"model": backbone.state_dict()}, tmp_path / "backbone.pth")
    more = ("name=learns", f"init.checkpoint={tmp_path / 'backbone.pth'}", "data.workers_per_rank=1")
    length = ("train.epochs=24", "train.micro_batch=4", "evaluate.every_epochs=24", "optimizer.layer_decay=null")
    faster = ("optimizer.lr_peak=3e-3", "optimizer.ema_decay=0.9", "model.head_channels=32", "model.drop_path_rate=0")
    done = launch(*small(squares, tmp_path, *more, *length, *faster))
    assert done.returncode == 0, done.stderr
    assert f"backbone: weights from {tmp_path / 'backbone.pth'}" in done.stdout
    assert "head: fresh" in done.stdout
    run = tmp_path / "learns"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["miou"] > 50  # ground alone is 32
    assert summary["mlflow_run_id"]
    rows = list(csv.DictReader((run / "classes.csv").read_text().splitlines()))
    assert {row["class"] for row in rows} == set(CLASSES)
    assert [float(row["iou"]) for row in rows] == sorted(float(row["iou"]) for row in rows)
    assert sum(float(row["iou"]) for row in rows) / 3 == pytest.approx(summary["miou"], abs=0.01)
    weights = load_file(Path(summary["checkpoint"]) / "ema.safetensors")
    assert not [name for name in weights if name.startswith(("backbone.norm.", "backbone.head."))]

    # Measured again, alone and by two ranks, it is the same; by windows and mirror images, another result beside it.
    for more in (
        ["--name", "alone"],
        ["--ranks", "2", "--name", "two"],
        ["--mode", "slide", "--stride", "40", "--flip"],
    ):
        done = run_module("pipeline", "evaluate-segment", str(run), *more)
        assert done.returncode == 0, done.stderr
    found = {path.parent.name: json.loads(path.read_text()) for path in run.glob("evaluations/*/segmentation.json")}
    assert {"alone", "two", "step-00000120-ema-squares-slide40-flip"} == set(found)
    for name in ("alone", "two"):
        assert found[name]["results"]["miou"] == pytest.approx(summary["miou"], abs=1e-4)
        assert found[name]["results"]["val_samples"] == 7
    assert found["alone"]["classes"] == found["two"]["classes"]
    files = {"per_class.csv", "per_class.png", "best_and_worst.png", "segmentation.json"}
    files |= {f"picture-{number}.jpg" for number in range(1, 8)}
    assert {path.name for path in (run / "evaluations" / "two").iterdir()} == files
    told = found["two"]["pictures"]
    assert [each["score_percent"] for each in told] == sorted((each["score_percent"] for each in told), reverse=True)
    assert told == found["alone"]["pictures"]
    assert told[0]["classes"].keys() <= {"ground", "red", "blue"}
    wide = ["--mode", "slide", "--stride", "999"], "evaluate.stride_px 999 is above data.resolution 64"
    for asked, told in ((["--scales", "0"], "evaluate.scales[0] = 0.0: "), wide):
        done = run_module("pipeline", "evaluate-segment", str(run), *asked)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert told in done.stderr
    for command in ("evaluate", "export"):
        more = ["--to", "timm"] if command == "export" else []
        done = run_module("pipeline", command, str(run), *more)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert "is of a run that learned to segment" in done.stderr

    # What else looks at runs knows it.
    done = run_module("pipeline", "review", str(run), "--html", str(tmp_path / "page.html"), COLUMNS="200")
    assert "mIoU" in done.stdout, done.stdout + done.stderr
    assert f"{summary['miou']:.2f}" in done.stdout
    done = run_module("pipeline", "checkpoint", str(run), COLUMNS="200")
    assert "mIoU %" in done.stdout
    assert f"{summary['miou']:.2f}" in done.stdout
    done = run_module("pipeline", "sync-tracking", str(run))
    assert done.returncode == 0, done.stderr
    (tmp_path / "again").mkdir()
    more = [f"init.checkpoint={run}", f"output_root={tmp_path / 'again'}"]
    done = run_module("pipeline", *small(squares, tmp_path, *more), "--check")
    assert "is of a run that learned to segment: give one of a classification" in done.stderr


def test_doctor_looks_at_its_data(squares: Path, tmp_path: Path) -> None:
    command, config, *overrides = small(squares, tmp_path)
    assert command == "segment"
    done = run_module("pipeline", "doctor", config, *overrides, "--fast", "--json")
    findings = {each["check"]: each for each in json.loads(done.stdout)["findings"]}
    assert (done.returncode, findings["data"]["status"]) == (0, "pass"), done.stdout
    short = tmp_path / "short"
    shutil.copytree(squares, short)
    (short / "val-000000.tar").write_bytes(b"")
    done = run_module("pipeline", "doctor", config, *overrides, f"data.path={short}", "--fast", "--json")
    findings = {each["check"]: each for each in json.loads(done.stdout)["findings"]}
    assert (done.returncode, findings["shards"]["status"]) == (1, "fail")
    assert "val-000000.tar has 0 bytes" in findings["shards"]["text"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["data.resolution=100"], ["data.resolution 100 is not a multiple of 32", "nearest: 96"]),
        (["model.compile=true"], ["no key 'model.compile'"]),
        (["evaluate.mode=slide", "evaluate.stride_px=65"], ["evaluate.stride_px 65 is above data.resolution 64"]),
        (["checkpoint.best_metric=top1"], ["checkpoint.best_metric top1 is of another task"]),
        (["augment.scale_min=3", "augment.scale_max=2"], ["augment.scale_min 3 is above augment.scale_max 2"]),
        (["train.global_batch=64"], ["40 training samples do not fill one global batch of 64"]),
        (["augment.mixup_alpha=1"], ["no key 'augment.mixup_alpha'"]),
        (["model.head=gn-uper", "model.head_channels=9"], ["model.head_channels 9 is odd"]),
        (["evaluate.short_side_px=500"], ["evaluate.short_side_px 500 is above evaluate.long_side_max_px 384"]),
        (["data.path=s3://bucket/x"], ["s3://bucket/x: sets with masks are read from local folders"]),
    ],
)
def test_refused_before_anything_starts(squares: Path, tmp_path: Path, more: list[str], told: list[str]) -> None:
    done = run_module("pipeline", *small(squares, tmp_path, *more), "--check", "--ranks", "2")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert all(text in done.stderr for text in told), done.stderr


def test_configurations_of_other_tasks(squares: Path) -> None:
    """Each command says of which the other's file is."""
    done = run_module("pipeline", "pretrain", CONFIG, "--check")
    assert "demo_segment.yaml is the configuration of `task: segment`" in done.stderr
    assert "`python -m pipeline segment`" in done.stderr
    done = run_module("pipeline", "segment", "configs/demo_pretrain.yaml", "--check")
    assert "is the configuration of a classification" in done.stderr
    done = run_module("pipeline", "pretrain", "configs/demo_pretrain.yaml", f"data.path={squares}", "--check")
    assert "is a data set of masks or boxes" in done.stderr
