"""Archive -> shards -> two deepspeed ranks -> fine-tuning, with the real launcher, DeepSpeed, FFCV and MLflow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, Datasets, launch, launch_environment, log_of, needs_ffcv, run_module, small_run
from safetensors.torch import load_file

from data_prep.manifest import Manifest
from pipeline.__main__ import main as pipeline_main
from pipeline.config import load
from pipeline.data.loader import Ranks, training_batches, training_order, validation_batches
from pipeline.evaluate import evaluate
from pipeline.recipe import build_model, mixing_and_loss, optimizer, parameter_groups, schedule

NAME = "demo-pretrain"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pretrained(datasets: Datasets, root: Path) -> Path:
    """The undisturbed run: ZeRO-1, two ranks, accumulation, checkpointing, EMA."""
    done = launch(*small_run(datasets, root))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "demo-pretrain: done" in done.stdout
    assert "make finetune" in done.stdout
    return root / NAME


def weights(run: Path, file: str = "model.safetensors", step: int = 18) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / file)


def test_what_a_run_leaves(pretrained: Path, datasets: Datasets) -> None:
    lines = log_of(pretrained.parent, NAME)
    assert [line["step"] for line in lines] == list(range(1, 19))
    wanted = {"step", "samples_seen", "epoch", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "time"}
    assert wanted <= set(lines[0])
    assert np.mean([line["loss"] for line in lines[-4:]]) < np.mean([line["loss"] for line in lines[:4]])
    assert sorted(p.name for p in (pretrained / "checkpoints").iterdir()) == ["step-00000015", "step-00000018"]
    summary = json.loads((pretrained / "summary.json").read_text())
    assert summary["samples_seen"] == 18 * 16
    assert summary["val_samples"] == 28
    assert 0 <= summary["top1"] <= summary["top5"] <= 100
    resolved = yaml.safe_load((pretrained / "config.yaml").read_text())
    assert resolved["data"]["path"] == str(datasets.in22k)

    client = mlflow.MlflowClient(f"sqlite:///{pretrained.parent / 'mlflow.db'}")
    run = client.get_run(summary["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.global_batch"] == "16"
    assert run.data.tags["dataset_id"] == Manifest.load(datasets.in22k).dataset_id
    history = client.get_metric_history(summary["mlflow_run_id"], "loss")
    found = {metric.step: metric.value for metric in history}
    assert found == pytest.approx({line["step"]: line["loss"] for line in lines}, rel=1e-6)
    artifacts = {item.path for item in client.list_artifacts(summary["mlflow_run_id"])}
    assert artifacts == {"config.yaml", "log.jsonl", "summary.json", "dataset.json"}


def test_equals_plain_pytorch(pretrained: Path, datasets: Datasets) -> None:
    """Two ranks of ZeRO-1 with accumulation compute what thirty lines of PyTorch do: weights, EMA, accuracy."""
    config = load(pretrained / "config.yaml")
    manifest = Manifest.load(config.data.path)
    order = training_order(config, manifest)
    torch.manual_seed(config.seed)
    model = build_model(config.model, 4, 32).train()
    groups = parameter_groups(model, config.optimizer)
    adamw = optimizer(groups, config)
    for parameter in model.parameters():
        adamw.init_state(parameter)
    rates = schedule(adamw, config.optimizer, order.steps_per_epoch, 18)
    mix, loss = mixing_and_loss(config.augment, 4)
    readers = [training_batches(config, manifest, order, Ranks(rank, 2), 0, 18) for rank in (0, 1)]
    losses, norms = [], []
    for step in range(18):
        rates.step_update(step)
        total = 0.0
        for rank, reader in enumerate(readers):
            for micro in (0, 1):
                images, labels, *_ = next(reader)
                key = (config.seed, step, (rank * 2 + micro) * 4)
                torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
                images, targets = mix(images, labels, key)
                value = loss(model(images), targets) / 4
                value.backward()
                total += value.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad_norm).item())
        adamw.step()
        adamw.zero_grad()
        losses.append(total)
    lines = log_of(pretrained.parent, NAME)
    assert losses == pytest.approx([line["loss"] for line in lines], rel=2e-3)
    assert norms[:5] == pytest.approx([line["grad_norm"] for line in lines[:5]], rel=2e-3)
    found, averaged = weights(pretrained), weights(pretrained, "ema.safetensors")
    for name, parameter in model.named_parameters():
        # Adam's first steps divide noise by noise, so single entries drift; whole tensors must not.
        for mine, theirs in ((parameter.detach(), found[name]), (adamw.state[parameter]["ema"], averaged[name])):
            assert (mine - theirs).norm() <= 1e-2 * mine.norm() + 1e-5, name


@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        (["train.zero_stage=3", "name=zero3"], 1e-4),
        (["train.zero_stage=2", "name=zero2-bf16", "train.precision=bf16"], 0.05),
    ],
)
def test_zero_stages_are_the_same_run(
    pretrained: Path, datasets: Datasets, root: Path, more: list[str], tolerance: float
) -> None:
    done = launch(*small_run(datasets, root, *more))
    assert done.returncode == 0, done.stdout + done.stderr
    name = more[1].removeprefix("name=")
    expected = [line["loss"] for line in log_of(root, NAME)]
    assert [line["loss"] for line in log_of(root, name)] == pytest.approx(expected, rel=tolerance)
    assert all(value.dtype == torch.float32 for value in weights(root / name).values())


def test_killed_launcher_same_command_same_weights(pretrained: Path, datasets: Datasets, root: Path) -> None:
    """kill -9 of the launcher takes the ranks along; the same command ends bit-equal to the undisturbed run."""
    arguments = small_run(datasets, root, "name=killed")
    command = [str(ROOT / "launch" / "deepspeed.sh"), *arguments]
    log = root / "killed" / "log.jsonl"
    with open(root / "killed.out", "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=launch_environment(), stdout=output, stderr=output)
        deadline = time.monotonic() + 300
        while not (log.exists() and '"step": 8' in log.read_text()):
            assert process.poll() is None, (root / "killed.out").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = launch(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        ours, theirs = weights(root / "killed", file), weights(pretrained, file)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), file
    # A step in the log once, although the killed try had got further than its checkpoint.
    assert [line["step"] for line in log_of(root, "killed")] == list(range(1, 19))
    assert [line["loss"] for line in log_of(root, "killed")] == [line["loss"] for line in log_of(root, NAME)]
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    runs = client.search_runs(["1"], "attributes.run_name = 'killed'")
    assert [run.info.status for run in runs] == ["FINISHED"]


def test_another_world_size_goes_on(pretrained: Path, datasets: Datasets, root: Path) -> None:
    """The checkpoint at step 15 of two ranks, continued by torchrun on one: the same batches, the same losses."""
    run = root / "elsewhere"
    first = run / "checkpoints" / "step-00000015"
    first.parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", str(pretrained / "checkpoints" / first.name), str(first)], check=True)
    meta = json.loads((first / "checkpoint.json").read_text())
    meta["config"]["name"] = "elsewhere"
    (first / "checkpoint.json").write_text(json.dumps(meta))
    done = launch(*small_run(datasets, root, "name=elsewhere"), ranks=1, launcher="torchrun")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = log_of(root, "elsewhere")
    assert [line["step"] for line in lines] == [16, 17, 18]
    expected = [line["loss"] for line in log_of(root, NAME)[15:]]
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-5)


def test_finetune_and_evaluate(pretrained: Path, datasets: Datasets, root: Path) -> None:
    """From the pretrained weights at another resolution: head by WordNet id, filters resized, layer decay."""
    arguments = small_run(
        datasets,
        root,
        f"init.checkpoint={pretrained}",
        "data.resolution=64",
        "optimizer.layer_decay=0.7",
        stage="finetune",
    )
    done = launch(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 3" in done.stdout  # the table wraps the rest
    run = root / "demo-finetune"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_samples"] == 21
    assert weights(run, step=12)["head.weight"].shape[0] == 3
    again = run_module("pipeline", "evaluate", str(run))
    assert again.returncode == 0, again.stderr
    assert f"{summary['top1']:.2f}" in again.stdout
    # The same figure by hand, from the file alone.
    config = load(run / "config.yaml")
    model = build_model(config.model, 3, 64)
    model.load_state_dict(weights(run, "ema.safetensors", step=12))
    batches = validation_batches(config, Manifest.load(datasets.in1k), Ranks())
    by_hand = evaluate(model, batches, torch.device("cpu"), bf16=False)
    assert by_hand["top1"] == pytest.approx(summary["top1"])


@needs_ffcv
def test_ffcv_by_one_line(datasets: Datasets, root: Path) -> None:
    options = ("data.format=ffcv", "data.workers_per_rank=1", "name=ffcv")
    done = launch(*small_run(datasets, root, *options))
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [line["loss"] for line in log_of(root, "ffcv")]
    assert len(losses) == 18
    assert np.isfinite(losses).all()


def test_a_mistake_is_one_line_before_anything_starts(datasets: Datasets, root: Path) -> None:
    done = launch(*small_run(datasets, root), "data.path=/nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: /nowhere does not exist")
    assert done.stderr.count("\n") == 1


def test_damage_that_only_training_can_find(datasets: Datasets, root: Path, tmp_path: Path) -> None:
    """An image of the right size that does not decode: the rank that met it names it, and all ranks end at once."""
    broken = tmp_path / "broken"
    shutil.copytree(datasets.in22k, broken)
    manifest = Manifest.load(broken)
    entry = manifest.split("train").shards[0]
    start = int(manifest.load_index(broken, entry).offsets[5])
    content = bytearray((broken / entry.file).read_bytes())
    content[start : start + 100] = bytes(100)
    (broken / entry.file).write_bytes(content)
    done = launch(*small_run(datasets, root, "name=broken", f"data.path={broken}"))
    assert done.returncode == 1
    assert f"shard {broken / entry.file}: sample 'n" in done.stderr
    assert "(id 5) does not decode" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    runs = client.search_runs(["1"], "attributes.run_name = 'broken'")
    # KILLED where the launcher's SIGTERM reached rank 0 before it missed the rank that failed.
    assert [run.info.status in ("FAILED", "KILLED") for run in runs] == [True]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["optimizer.lr_peek=1"], "did you mean 'optimizer.lr_peak'"),
        (["train.global_batch=20"], "20 is not divisible by 2 ranks x train.micro_batch 4 = 8"),
        (["seed=5"], "of another configuration: seed was 0, is 5"),
        (["model.name=hornet_tiny_gf"], "model.name was 'hornet_nano_gf', is 'hornet_tiny_gf'"),
        (["name=other", "model.name=hornet_tiny_gf", "init.checkpoint={run}"], "is a checkpoint of hornet_nano_gf"),
        (["name=other", "init.checkpoint=/nowhere"], "/nowhere is neither a run folder"),
        (["--resume", "never"], "already holds a run"),
    ],
)
def test_what_the_check_finds(
    pretrained: Path,
    datasets: Datasets,
    root: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    arguments = [*small_run(datasets, root), *(text.format(run=pretrained) for text in more)]
    assert pipeline_main([*arguments, "--check", "--ranks", "2"]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
