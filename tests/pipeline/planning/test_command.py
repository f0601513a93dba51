"""`python -m pipeline plan`: every configuration plans, what it says fits together, and what is wrong is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main as data_prep
from data_prep.manifest import Manifest
from pipeline.__main__ import main
from pipeline.config.load import load
from pipeline.planning.images import images_of
from tests.support.datasets import archive
from tests.support.runs import ROOT

# What their heads compute hangs on the objects in the images.
UNTRACEABLE = [*(ROOT / "configs").glob("*detect*.yaml"), *(ROOT / "configs").glob("*mask2former*.yaml")]
CONFIGS = sorted({*(ROOT / "configs").glob("*.yaml")} - {*UNTRACEABLE})
DEMO = str(ROOT / "configs" / "demo_pretrain.yaml")
SMALL = (DEMO, "data.path=nowhere/demo-22k", "data.resolution=32", "train.global_batch=64", "train.micro_batch=8")


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The plan as JSON."""
    code = main(["plan", *arguments, "--json"])
    told = capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that says why there is no plan."""
    assert main(["plan", *arguments]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    return line


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_plans(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With the smallest net in place of theirs: a trace costs as many operations as the net has."""
    gpus = 1 if "demo" in path.stem else 8
    small = (f"data.path={tmp_path}/in22k", "model.name=hornet_nano_gf", "data.resolution=32", "train.micro_batch=8")
    if "segment" in path.stem:
        small = (*small, "model.head_channels=8", "evaluate.stride_px=16", "train.micro_batch=2")
    found = planned(capsys, str(path), *small, "--classes", "50", "--gpus", str(gpus), "--gpu", "a100")
    assert found["predicted"]
    assert found["steps"] > 0
    assert 0 < found["run"]["mfu"]["low"] < found["run"]["mfu"]["high"] < 1
    assert found["memory"]["total"] == sum(found["memory"]["parts"].values())
    assert found["run"]["images_per_second"]["low"] <= found["run"]["images_per_second"]["high"]
    assert {row["gpus"] for row in found["scaling"]} >= {1, 8, 64, 512}
    assert found["data"]["known_by"].startswith("assumed")


@pytest.mark.parametrize("path", sorted(UNTRACEABLE), ids=lambda path: path.stem)
def test_what_cannot_be_traced_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be planned: what its head" in refused(capsys, str(path), "--gpus", "1")


def test_the_numbers_fit_together(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *SMALL, "--gpus", "8", "--price", "3", "--images", "64000", "--policies", "all")
    epochs = 18
    assert found["steps"] == 1000 * epochs
    run = found["run"]
    for end in ("low", "high"):
        assert run["images_per_second"][end] == pytest.approx(64 / run["step_seconds"][end])
        assert run["hours"][end] == pytest.approx(found["steps"] * run["step_seconds"][end] / 3600)
        assert run["cost"][end] == pytest.approx(run["hours"][end] * 8 * 3)
    kept = {row["name"]: row["kept_per_image"] for row in found["policies"]}
    assert kept["selective"] > kept["selective_mlp"] > kept["block"] > kept["stage"] > 0
    assert kept["none"] == kept["selective"]  # an H100 runs our kernels
    largest = {row["name"]: row["largest_micro_batch"] for row in found["policies"]}
    assert largest["block"] > largest["selective_mlp"] > largest["selective"] > 8
    need = found["loader_per_node"]
    assert need["images_per_second"] == pytest.approx(run["images_per_second"]["high"])
    assert need["disk_bytes_per_second"] > need["images_per_second"] * found["data"]["bytes_each"]
    refusals = {row["gpus"]: row.get("refused", "") for row in found["scaling"]}
    assert "512 GPUs do not divide train.global_batch 64" in refusals[512]


def test_more_gpus_share_states_and_links_show(capsys: pytest.CaptureFixture[str]) -> None:
    fast = planned(capsys, *SMALL, "--gpus", "8", "--gpus-per-node", "4", "--link-gbps", "400")
    slow = planned(capsys, *SMALL, "--gpus", "8", "--gpus-per-node", "4", "--link-gbps", "0.1")
    assert slow["run"]["images_per_second"]["high"] < fast["run"]["images_per_second"]["high"]
    assert "between nodes" in slow["run"]["held_up_by"]
    assert slow["stops_scaling"].startswith("8 GPUs")
    stages = fast["zero_stages"]
    assert stages["0"]["states_bytes"] > stages["1"]["states_bytes"]
    assert stages["1"]["sent_bytes"] == pytest.approx(1.5 * stages["0"]["sent_bytes"])


def test_what_the_manifest_says_goes_before_guesses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = archive(tmp_path / "source.tar", ("n00000001", "n00000002"), 12)
    folder = tmp_path / "set"
    code = data_prep(
        ["shard", "--source", str(source), "--val-per-class", "2", "--workers", "1", "--output", str(folder)]
    )
    assert code == 0
    capsys.readouterr()
    more = ("train.global_batch=16", "data.shuffle_lanes=1", "--gpus", "1", "--gpu", "a100")
    found = planned(capsys, *SMALL, f"data.path={folder}", *more)
    manifest = Manifest.load(folder)
    assert found["data"]["count"] == manifest.split("train").samples == 20
    assert found["data"]["classes"] == manifest.num_classes == 2
    assert str(folder) in found["data"]["known_by"]


@pytest.mark.parametrize(
    ("path", "images", "classes"),
    [
        ("data/in22k", 13_153_500, 19_167),
        ("s3://bucket/fall11", 14_197_122, 21_841),
        ("data/in1k", 1_281_167, 1_000),
    ],
)
def test_label_spaces_that_are_known(path: str, images: int, classes: int) -> None:
    found = images_of(load(Path(DEMO), [f"data.path={path}", "name=run"]), None, None)
    assert (found.count, found.classes) == (images, classes)
    assert "assumed" in found.known_by


def test_measured_rates_replace_guesses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rates = tmp_path / "rates.yaml"
    rates.write_text(
        "gpus: [{gpu: h100, train: [{model: hornet_nano_gf, resolution: 32, policy: selective, precision: bf16, "
        "images_per_second: 100}]}]"
    )
    guessed = planned(capsys, *SMALL, "--gpus", "1")
    found = planned(capsys, *SMALL, "--gpus", "1", "--gpu-rates", str(rates))
    assert 90 < found["run"]["images_per_second"]["low"] <= found["run"]["images_per_second"]["high"] <= 100
    assert guessed["run"]["images_per_second"]["low"] > 3 * found["run"]["images_per_second"]["high"]
    assert any("as measured" in line for line in found["assumptions"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not valid JSON"),
        ('{"gpus": [{"gpu": "h900"}]}', "gpu 'h900' is not known"),
        ('{"gpus": [{"gpu": "h100", "gemm_tflops": {"bf16": -1}}]}', "gpus.0.gemm_tflops.bf16"),
        ('{"gpus": [{"gpu": "h100", "gemm": 1}]}', "gpus.0.gemm"),
        ("[]", "the whole"),
    ],
)
def test_bad_rates_are_one_line(content: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(content)
    line = refused(capsys, *SMALL, "--gpu-rates", str(tmp_path / "rates.json"))
    assert "rates.json" in line
    assert says in line


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--gpu", "h300"), "there are h100, h100-pcie, h200"),
        (("--gpus", "0"), "--gpus 0 has to be above 0"),
        (("--gpus", "7"), "7 ranks x train.micro_batch 8 = 56; change one of them"),
        (("--price", "-1"), "--price -1"),
        (("--images", "10"), "10 training images do not fill one global batch of 64"),
        (("--plot", "plan.gif"), "has to end in .png or .svg"),
        (("--plot", "no/such/folder/plan.png"), "no folder no/such/folder"),
        (("--gpu-rates", "no-such-file.json"), "no-such-file.json cannot be read"),
        (("model.nam=x",), "did you mean 'model.name'"),
    ],
)
def test_what_cannot_be_is_one_line(more: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, *SMALL, *more)


def test_tables_and_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("plan.svg", "plan.png"):
        assert main(["plan", *SMALL, "--gpus", "8", "--plot", str(tmp_path / name)]) == 0
    told = capsys.readouterr().out
    for word in (
        "predicted",
        "DeepSpeed's buckets",
        "kept, MB an image",
        "largest micro-batch",
        "GPU-hours",
        "assumed",
        "stops scaling",
        "█",
    ):
        assert word in told
    assert re.search(r"MFU +│ \d+ (to \d+ )?%|MFU +│ \d+ to \d+ %", told)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "plan.svg").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
