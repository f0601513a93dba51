"""Archive -> shards -> two deepspeed ranks -> fine-tuning, with the real launcher, DeepSpeed, FFCV and MLflow."""

from __future__ import annotations

import json
import os
import random
import re
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
from PIL import Image
from safetensors.torch import load_file

from data_prep.manifest import Manifest
from pipeline.__main__ import main as pipeline_main
from pipeline.config.load import load
from pipeline.data.loader import training_batches, validation_batches
from pipeline.data.opened import training_order
from pipeline.evaluation.accuracy import evaluate
from pipeline.models.build import build_model
from pipeline.ranks.collectives import Ranks
from pipeline.ranks.lifetime import EXIT_REQUEUE
from pipeline.records.review_address import review_base, run_address
from pipeline.training.recipe import mixing_and_loss, optimizer, parameter_groups, schedule
from tests.chaos import STEPS, Chaos, rank_process
from tests.support.datasets import Datasets
from tests.support.processes import PATIENCE_SECONDS, wait_for
from tests.support.runs import RECORDER, ROOT, launch, launch_environment, log_of, run_module, small_run

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
    run_id = json.loads((root / NAME / "summary.json").read_text())["mlflow_run_id"]
    assert f"MLflow (after `make review`): {run_address(review_base(), '1', run_id)}\n" in done.stdout
    return root / NAME


def weights(run: Path, file: str = "model.safetensors", step: int = 18) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / file)


def test_what_a_run_leaves(pretrained: Path, datasets: Datasets) -> None:
    lines = log_of(pretrained.parent, NAME)
    assert [line["step"] for line in lines] == list(range(1, 19))
    wanted = {"step", "samples_seen", "epoch", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "time"}
    wanted |= {"data_wait_max", "memory_gb", "ema_decay", "skipped_steps", "rewinds", "checkpoints_failed"}
    assert wanted <= set(lines[0])
    assert np.mean([line["loss"] for line in lines[-4:]]) < np.mean([line["loss"] for line in lines[:4]])
    kept = sorted(path.name for path in (pretrained / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000015", "step-00000018"]
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
    pictures = {"curves.png", "training_images.jpg"}
    assert artifacts == {"config.yaml", "log.jsonl", "summary.json", "dataset.json", *pictures}
    for name in pictures:
        with Image.open(pretrained / name) as image:
            assert image.width > 300
    # How busy the node was, at each step that is logged, under its name.
    node = os.uname().nodename
    busy = [
        metric.step
        for metric in client.get_metric_history(run.info.run_id, f"system/{node}/cpu_utilization_percentage")
    ]
    assert sorted(busy) == list(range(1, 19))
    assert run.data.metrics[f"system/{node}/network_transmit_megabytes"] >= 0


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


def test_killed_at_random_same_command_same_weights(datasets: Datasets, tmp_path: Path) -> None:
    """The bounded form of `make chaos`: one run, under either launcher."""
    chaos = Chaos(datasets, tmp_path)
    draw = random.Random(time.time_ns())
    outcome = chaos.run("disturbed", draw.choice(("deepspeed", "torchrun")), draw, disturbances=1)
    assert outcome.faults == [], outcome
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs(["1"], "attributes.run_name = 'disturbed'")
    assert run.info.status == "FINISHED"
    # However often a step was run, it stands in MLflow once.
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, STEPS + 1))


def test_asked_to_stop(pretrained: Path, datasets: Datasets, root: Path) -> None:
    """SIGUSR1 to one rank: all save at the next step, the launcher ends with 75, and the same command goes on."""
    go_on = root / "asked.go-on"
    process, out = started(datasets, root, "asked", "torchrun", HOLD_AT=f"8:{go_on}")
    wait_for(lambda: '"step": 8' in text_of(root / "asked" / "log.jsonl"), process, out.read_text)
    os.kill(rank_process(process.pid, 1), signal.SIGUSR1)
    wait_for(lambda: "SIGUSR1" in out.read_text(), process, out.read_text)
    go_on.touch()
    assert process.wait(timeout=PATIENCE_SECONDS) == EXIT_REQUEUE, out.read_text()
    said = out.read_text()
    assert "SIGUSR1: a checkpoint follows at the next step" in said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "stopped (SIGUSR1) with" in line]
    stopped = int(line.split()[1])
    assert stopped == 9
    assert (root / "asked" / "checkpoints" / "latest").readlink() == Path(f"step-{stopped:08d}")
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    (run,) = client.search_runs(["1"], "attributes.run_name = 'asked'")
    assert (run.info.status, run.data.tags["stopped"]) == ("KILLED", "SIGUSR1")
    done = launch(*small_run(datasets, root, "name=asked"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"step-{stopped:08d}" in done.stdout  # the plan says where it goes on from
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        ours, theirs = weights(root / "asked", file), weights(pretrained, file)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), file
    assert [line["loss"] for line in log_of(root, "asked")] == [line["loss"] for line in log_of(root, NAME)]
    (run,) = client.search_runs(["1"], "attributes.run_name = 'asked'")
    assert (run.info.status, run.data.tags["restarts"]) == ("FINISHED", "1")
    told = [line.partition("  step ")[2] for line in (root / "asked" / "events.txt").read_text().splitlines()]
    assert told[0].startswith(f"{stopped}  stopped (SIGUSR1) with ")
    assert told[1:] == [f"{stopped}  RESUMED from step-{stopped:08d} on 2 ranks"]


def test_a_rank_that_hangs_ends_the_run(datasets: Datasets, root: Path) -> None:
    """SIGSTOP to rank 1: rank 0 says which rank to look at, leaves its stacks, and the run is over, not hanging."""
    process, out = started(datasets, root, "hanging", "deepspeed", "guard.stall_seconds=20", "train.epochs=50")
    wait_for(lambda: '"step": 3' in text_of(root / "hanging" / "log.jsonl"), process, out.read_text)
    os.kill(rank_process(process.pid, 1), signal.SIGSTOP)
    assert process.wait(timeout=PATIENCE_SECONDS) == 1, out.read_text()  # the launcher kills what is left after 30 s
    (line,) = [line for line in out.read_text().splitlines() if line.startswith("error:")]
    assert "rank 1" in line
    stacks = (root / "hanging" / "stacks" / "rank-00000.txt").read_text()
    # In whichever collective came next: that of a step, or of its line in the log.
    assert re.search(r'pipeline/training/run\.py", line \d+ in train\n', stacks)
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    (run,) = client.search_runs(["1"], "attributes.run_name = 'hanging'")
    assert run.info.status == "FAILED"
    assert "rank 1" in run.data.tags["stopped"]


def started(
    datasets: Datasets, root: Path, name: str, launcher: str, *more: str, **environment: str
) -> tuple[subprocess.Popen[bytes], Path]:
    """A run under its launcher, and the file that takes what it prints."""
    command = [str(ROOT / "launch" / f"{launcher}.sh"), *small_run(datasets, root, f"name={name}", *more)]
    out = root / f"{name}.out"
    environment = {**launch_environment(), "PYTHONPATH": str(RECORDER), **environment}
    with open(out, "w") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output), out


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


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
    words = re.sub(r"[│┃\s]+", " ", done.stdout)  # the table wraps where a path is long
    assert "2 of 3 classes from the source by WordNet id" in words, words
    run = root / "demo-finetune"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_samples"] == 21
    assert weights(run, step=12)["head.weight"].shape[0] == 3
    again = run_module("pipeline", "evaluate", str(run))
    assert again.returncode == 0, again.stderr
    assert f"{summary['top1']:.2f}" in again.stdout
    check_the_experiment(root, pretrained, run)
    # The same figure by hand, from the file alone.
    config = load(run / "config.yaml")
    model = build_model(config.model, 3, 64)
    model.load_state_dict(weights(run, "ema.safetensors", step=12))
    batches = validation_batches(config, Manifest.load(datasets.in1k), Ranks())
    by_hand = evaluate(model, batches, torch.device("cpu"), bf16=False)
    assert by_hand["top1"] == pytest.approx(summary["top1"])


def test_adapt(pretrained: Path, datasets: Datasets, root: Path) -> None:
    """The same classes at a larger resolution, step by step; of other classes it is refused."""
    adapted = [
        *(f"init.checkpoint={pretrained}", "name=adapted", "data.resolution=64", "train.epochs=2"),
        "data.resolution_by_epoch={0: 32, 1: 64}",
    ]
    done = run_module("pipeline", "adapt", *small_run(datasets, root, *adapted)[1:])
    assert done.returncode == 0, done.stderr
    assert "4 of 4 classes from the source by WordNet id" in re.sub(r"[│┃\s]+", " ", done.stdout)
    assert weights(root / "adapted", step=12)["stages.2.0.gnconv.dwconv.complex_weight"].shape[1:3] == (4, 3)
    assert (root / "adapted" / "unmatched_classes.tsv").read_text() == ""
    others = small_run(datasets, root, f"init.checkpoint={pretrained}", "name=others", stage="finetune")[1:]
    refused = run_module("pipeline", "adapt", *others)
    assert refused.returncode == 1
    assert "adapt keeps the classes, and 1 of 3 are not in" in refused.stderr
    assert refused.stderr.count("\n") == 1


def check_the_experiment(root: Path, pretrained: Path, finetuned: Path) -> None:
    """In MLflow both stages and their data stand under one parent, with what made them."""
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    ids = [json.loads((run / "mlflow_run.json").read_text()) for run in (pretrained, finetuned)]
    assert ids[0]["parent_id"] == ids[1]["parent_id"]
    parent = client.get_run(ids[0]["parent_id"])
    assert (parent.info.run_name, parent.info.status) == ("demo", "FINISHED")
    top1 = [json.loads((run / "summary.json").read_text())["top1"] for run in (pretrained, finetuned)]
    assert [parent.data.metrics[f"{stage}_top1"] for stage in ("pretrain", "finetune")] == pytest.approx(top1)
    children = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    stages = sorted((child.data.tags["stage"], child.info.run_name) for child in children)
    assert stages == [
        ("data_prep", "data: in1k"),
        ("data_prep", "data: in22k"),
        ("evaluate", "evaluate demo-finetune: step-00000012-ema-in1k"),
        ("finetune", "demo-finetune"),
        ("pretrain", "demo-pretrain"),
    ]
    for child in children:
        tags, name = child.data.tags, child.info.run_name
        if tags["stage"] == "data_prep":
            manifest = Manifest.load(root_of_data(child))
            assert child.data.metrics["train_samples"] == manifest.split("train").samples
            assert child.data.metrics["images_kept"] > 0
            continue
        if tags["stage"] == "evaluate":
            assert child.data.metrics["top1_percent"] == pytest.approx(top1[1])
            assert parent.data.metrics["evaluate_in1k_top1_percent"] == pytest.approx(top1[1])
            assert {"reliability.png", "confusion.png", "evaluation.json"} <= {
                item.path for item in client.list_artifacts(child.info.run_id)
            }
            continue
        (data,) = (entry.dataset for entry in child.inputs.dataset_inputs)
        assert data.digest == tags["dataset_id"][:36]
        assert tags["hosts"] == os.uname().nodename
        assert json.loads(tags["versions"])["torch"] == torch.__version__
        assert f"name={name}" in tags["command"] or f"demo_{tags['stage']}.yaml" in tags["command"]
        assert Path(tags["checkpoint"]).is_dir()


def root_of_data(child: mlflow.entities.Run) -> Path:
    return Path(child.data.params["path"])


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
        (["name=other", "init.checkpoint=/nowhere"], "/nowhere does not exist: it has to be a run folder"),
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
