"""`bench-data`: what its table says fits together, and it says what to change."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_prep.manifest import Manifest
from pipeline.__main__ import main
from pipeline.bench_data.feeds import ImageFeed
from pipeline.bench_data.report import HostSpeed, RankSpeed, advice
from pipeline.config.load import load
from tests.support.datasets import Datasets, needs_ffcv
from tests.support.dense_sets import build_instances, build_semantic
from tests.support.runs import run_module, small_run

FFCV = ("data.format=ffcv", "augment.where=device")


def bench(datasets: Datasets, *more: str) -> tuple[int, dict[str, list[str]], str]:
    """(exit code, rows of the table by their first column, stderr) of the command, after two seconds at most."""
    done = run_module("pipeline", "bench-data", *small_run(datasets, Path("unused"))[1:], "--seconds", "1.5", *more)
    rows: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 2:
            rows.setdefault(cells[0], []).append(cells[1])
    return done.returncode, rows, done.stderr


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", text)]


@pytest.mark.parametrize(
    "more",
    [
        ("augment.where=host", "--ranks-per-node", "2"),
        ("augment.where=device", "data.workers_per_rank=2"),
        pytest.param(FFCV, marks=needs_ffcv),
    ],
)
def test_the_numbers_fit_together(datasets: Datasets, more: tuple[str, ...]) -> None:
    code, rows, errors = bench(datasets, *more)
    assert code == 0, errors
    ranks, seconds, images = numbers(rows["measured"][0])
    assert ranks == (2 if "2" in more else 1)
    assert 1.5 <= seconds < 10
    assert images > 0
    host, busy = numbers(rows["images/s, this host"][0])
    core = numbers(rows["images/s, one core"][0])[0]
    at_best, cores = numbers(rows["images/s, all cores"][0])
    assert host == pytest.approx(images / seconds, rel=0.1)
    assert core == pytest.approx(host / busy, rel=0.05)
    assert at_best == pytest.approx(core * cores, rel=0.01)
    assert numbers(rows["CPU time of an image"][0])[0] == pytest.approx(1000 / core, rel=0.05)
    assert 0 < busy < cores + 0.5
    manifest = json.loads((datasets.in22k / "dataset.json").read_text())
    train = manifest["splits"]["train"]
    stored = sum(shard["bytes"] for shard in train["shards"]) / train["samples"] / 1e3
    # Shards have headers and JSON files too; a .beton has pages.
    assert numbers(rows["bytes of an image"][0])[0] < stored or "data.format=ffcv" in more
    assert 0.05 < numbers(rows["memory"][0])[0] < 20
    assert not {"keeps up", "BAD SAMPLES"} & rows.keys()


def test_masks_and_objects_are_measured_too(tmp_path: Path) -> None:
    for task, data in (("segment", build_semantic(tmp_path)), ("detect", build_instances(tmp_path))):
        more = [f"data.path={data}", "init.checkpoint=null", "data.resolution=64", "train.global_batch=8"]
        more += ["train.micro_batch=4", "data.workers_per_rank=1", "--seconds", "1", "--need", "1e7"]
        done = run_module("pipeline", "bench-data", f"configs/demo_{task}.yaml", *more)
        assert done.returncode == 3, done.stderr
        rows = {line.split("│")[1].strip(): line.split("│")[2] for line in done.stdout.splitlines() if "│" in line}
        assert numbers(rows["images/s, this host"])[0] > 1
        manifest = json.loads((data / "dataset.json").read_text())["splits"]["train"]
        index = [np.load(data / entry["file"].replace(".tar", ".index.npz")) for entry in manifest["shards"]]
        mean = np.concatenate([each["image_bytes"] for each in index]).mean()
        assert numbers(rows["bytes of an image"])[0] == pytest.approx(mean / 1e3, rel=0.2)  # of those that were drawn
        assert ("model.masks=false" in done.stdout) == (task == "detect")


def test_need_of_a_run(datasets: Datasets, tmp_path: Path) -> None:
    """The median without the first line; what the GPUs waited for data is added; other lines do not count."""
    steps = [(5.0, 0.9), (30.0, 0.0), (10.0, 0.5), (1e6, 0.0), (9.0, 0.0)]
    lines = [{"loss": 1.0, "images_per_second": speed, "data_wait": wait} for speed, wait in steps]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, [*lines, {"top1": 3.0}])) + "\n")
    code, rows, errors = bench(datasets, "--run", str(tmp_path), "--ranks-per-node", "1")
    assert code == 0, errors
    assert numbers(rows["images/s needed"][0])[0] == 25.0
    assert rows["keeps up"][0].startswith("yes")
    factor = numbers(rows["images/s, this host"][0])[0] / 25
    assert numbers(rows["keeps up"][0])[0] == pytest.approx(factor, rel=0.01)
    code, rows, _ = bench(datasets, "--need", "1e7")
    assert code == 3
    assert rows["keeps up"][0].startswith("NO: 0.00 times")
    assert any("augment.where=device" in line for line in rows["change"])


def failing(datasets: Datasets, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The one line on stderr of the command, in this process."""
    arguments = ["bench-data", *small_run(datasets, Path("unused"))[1:], "--seconds", "1", *more]
    assert main(arguments) == 1
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1, errors
    return errors


def test_one_line_for_what_is_wrong(datasets: Datasets, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, wanted in {
        ("--run", str(tmp_path)): r"--run: .*log\.jsonl cannot be read",
        ("--ranks-per-node", "3"): "train.global_batch 16 is not divisible by 3 ranks",
        ("--need", "-1"): "have to be above 0",
        (f"data.path={tmp_path}",): "dataset.json",
        ("--seconds", "1", "data.path=nowhere"): "nowhere",
    }.items():
        assert re.match(rf"error: .*{wanted}", failing(datasets, capsys, *more))
    (tmp_path / "log.jsonl").write_text('{"top1": 3.0}\n')
    assert "has no images_per_second yet" in failing(datasets, capsys, "--run", str(tmp_path))


def test_damage_is_one_line(datasets: Datasets, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in datasets.in22k.iterdir():
        if path.is_file():
            content = path.read_bytes()
            (folder / path.name).write_bytes(bytes(len(content)) if path.suffix == ".tar" else content)
    code, _, errors = bench(datasets, f"data.path={folder}")
    assert code == 1
    assert re.match(r"error: shard .*\.tar: sample .* does not decode", errors), errors
    assert len(errors.splitlines()) == 1, errors


def speed_of(needed: float, cores_busy: float, cores: int = 16) -> HostSpeed:
    """One rank that makes 1,000 images per CPU-second."""
    return HostSpeed((RankSpeed(int(10_000 * cores_busy), 10.0, 10 * cores_busy, 1.0, 70e3, 1e9, 0),), cores, needed)


@pytest.mark.parametrize(
    ("options", "needed", "busy", "wanted"),
    [
        (("data.workers_per_rank=2",), 8_000, 2.0, ["data.workers_per_rank=9"]),
        (("data.path=s3://bucket/set", "data.workers_per_rank=8"), 8_000, 1.0, ["the network"]),
        (("data.workers_per_rank=16",), 8_000, 4.0, ["other programs"]),
        (
            ("augment.where=host", "data.workers_per_rank=16"),
            30_000,
            16.0,
            ["augment.where=device", "smaller", "32 cores"],
        ),
        (
            ("augment.where=device", "data.workers_per_rank=16"),
            30_000,
            16.0,
            ["data.format=ffcv of pix", "smaller", "32 "],
        ),
        ((*FFCV, "data.workers_per_rank=16"), 30_000, 16.0, ["data.format=webdataset", "smaller", "32 cores"]),
    ],
)
def test_advice(datasets: Datasets, options: tuple[str, ...], needed: float, busy: float, wanted: list[str]) -> None:
    feed = ImageFeed(load("configs/demo_pretrain.yaml", options), Manifest.load(datasets.in22k))
    found = advice(feed, speed_of(needed, busy))
    assert len(found) == len(wanted)
    assert all(part in line for part, line in zip(wanted, found, strict=True)), found
