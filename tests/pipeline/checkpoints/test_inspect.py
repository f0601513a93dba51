"""`python -m pipeline checkpoint`: what it says of good and of damaged ones, and what it leaves with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.manifest import Manifest, ShardEntry, Split
from pipeline.__main__ import main
from pipeline.checkpoints.state import CheckpointWriter
from pipeline.config.load import Config, load
from tests.support.checkpoints import DATASET, SYNSETS, TinyEngine, cut, flip_a_bit, meta_at
from tests.support.runs import ROOT


@pytest.fixture(autouse=True)
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    options = ["keep_last=2", "keep_every_steps=50", "best_metric=top1"]
    return load(ROOT / "configs/demo_pretrain.yaml", [f"output_root={tmp_path}", *(f"checkpoint.{o}" for o in options)])


@pytest.fixture
def run(config: Config) -> Path:
    """A run folder after 90 steps, of 40 an epoch."""
    samples = 40 * config.train.global_batch + 3
    shard = ShardEntry(file="train-000000.tar", samples=samples, bytes=10, sha256="0" * 64)
    split = Split(samples=samples, class_counts=[samples, 0, 0], shards=[shard])
    config.run_dir.mkdir()
    Manifest(name="m", dataset_id=DATASET, synsets=SYNSETS, splits={"train": split}).save(config.run_dir)
    writer, engine = CheckpointWriter(config.run_dir / "checkpoints", config.checkpoint, 0), TinyEngine()
    metrics = {"metrics": {"top1": 71.25, "val_loss": 1.5}, "metrics_step": 60}
    for engine.step in (50, 60, 80, 90):
        values = metrics if engine.step >= 60 else {}
        meta = meta_at(engine.step, config, guard={"in_a_row": 0, "losses": [1.0, 2.0]}, **values)
        writer.save(engine, meta.model_copy(update={"updates": engine.step - 1}))
        assert writer.wait()
    return config.run_dir


def row(output: str, step: int) -> list[str]:
    """The cells of a step's row."""
    line = next(line for line in output.splitlines() if re.match(rf"│ +{step} │", line))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", str(run)]) == 0
    output = capsys.readouterr().out
    assert row(output, 50)[1:3] + row(output, 50)[6:] == ["1.25", "3,200", "every", "good"]
    assert row(output, 60)[4:5] + row(output, 60)[6:] == ["71.25", "best", "good"]
    assert row(output, 80)[4:5] + row(output, 80)[6:] == ["71.25 (at 60)", "last", "good"]
    assert row(output, 90)[6:] == ["last, rewind", "good"]
    assert re.search(r"latest -> step-00000090; best -> step-00000060; sizes checked; --hashes reads every", output)
    flip_a_bit(run / "checkpoints" / "step-00000080" / "ema.safetensors")
    assert main(["checkpoint", str(run)]) == 0
    capsys.readouterr()
    assert main(["checkpoint", str(run), "--hashes"]) == 1
    output = capsys.readouterr().out
    assert (
        row(output, 80)[7] == "damaged: ema.safetensors has the right size but another sha256 than when it was written"
    )
    assert [row(output, step)[7] for step in (50, 60, 90)] == ["good"] * 3
    # Set aside, it is listed and no longer a reason to fail.
    (run / "checkpoints" / "step-00000080").rename(run / "checkpoints" / "damaged-step-00000080")
    assert main(["checkpoint", str(run), "--hashes"]) == 0
    assert row(capsys.readouterr().out, 80)[6] == "set aside"


def test_one_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", str(run / "checkpoints" / "latest"), "--tensors"]) == 0
    output = capsys.readouterr().out
    for fact in (
        r"step-00000090\s",
        r"model +│ hornet_",
        r"parameters +│ 1,003 ",
        r"classes +│ 3 ",
        rf"data set +│ {DATASET} ",
        r"step +│ 90 \(epoch 2\.25\)",
        r"updates +│ 89 \(1 steps without one\)",
        r"images seen +│ 5,760",
        r"metrics +│ top1 71\.25, val_loss 1\.5 \(at step 60\)",
        r"guard +│ in_a_row 0, losses \(2 values\)",
        r"model\.safetensors +│ +4,\d+ │ +2 │ 2 F32 +│ +4,012 │ \w{12} +│ good",
        r"optimizer\.safetensors +│ +8,\d+ │ +4 │ 4 F32 +│ +8,024 │",
        r"model\.safetensors +│ stem\.weight +│ 2 x 500 +│ F32 +│ 2846\.05",  # 90 x sqrt(1000)
        r"optimizer\.safetensors +│ exp_avg/head\.bias +│ 3 +│ F32 +│ 1090 ",
    ):
        assert re.search(fact, output), fact


def test_a_damaged_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / "step-00000090"
    flip_a_bit(path / "model.safetensors")
    cut(path / "ema.safetensors")
    (path / "optimizer.safetensors").unlink()
    assert main(["checkpoint", str(path)]) == 1
    output = capsys.readouterr().out
    for name, verdict in {
        "model": "model.safetensors has the right size but another sha256",
        "ema": r"ema.safetensors has 4,\d+ bytes instead of 4,\d+",
        "optimizer": "optimizer.safetensors is missing",
    }.items():
        assert re.search(rf"│ {name}\.safetensors .*│ {verdict}", output), name
    cut(path / "checkpoint.json")
    assert main(["checkpoint", str(path)]) == 1
    assert re.match(r"error: .*step-00000090: checkpoint\.json is damaged: ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("nowhere", "does not exist: it has to be a run folder"),
        ("demo-pretrain/checkpoints/step-00000090/checkpoint.json", "is a file; give a run folder or"),
        ("empty", "has no checkpoint yet"),
    ],
)
def test_what_is_none(run: Path, capsys: pytest.CaptureFixture[str], path: str, error: str) -> None:
    (run.parent / "empty" / "checkpoints").mkdir(parents=True)
    assert main(["checkpoint", str(run.parent / path)]) == 1
    assert error in capsys.readouterr().err


def test_a_log_does_not_break_names(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS")
    assert main(["checkpoint", str(run / "checkpoints" / "latest")]) == 0
    assert "│ optimizer.safetensors " in capsys.readouterr().out


def test_it_does_without_torch(run: Path) -> None:
    code = (
        "import sys; from pipeline.__main__ import main; code = main(sys.argv[1:]);"
        "sys.exit(code or [name for name in ('torch', 'deepspeed', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "checkpoint", str(run)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == "[]\n"  # what sys.exit prints of the list


@pytest.mark.parametrize("command", [("evaluate",), ("export", "--to", "timm")])
def test_a_name_that_is_not_there_is_told_without_torch(command: tuple[str, ...]) -> None:
    """Seconds to import, which a misspelt name need not wait for."""
    code = "import sys; from pipeline.__main__ import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "runs/none-such"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "1 False\n", done.stderr
    assert "error: runs/none-such does not exist" in done.stderr
