"""An interrupted run is the same run: every ZeRO stage, both data formats, other numbers of ranks, tensor by tensor;
and what bad batches, damaged checkpoints and a full disk do to it.

Real DeepSpeed on real gloo ranks; the runs of one launch share its processes (tests/support/programs/many_runs.py).
RESUME_STEPS=54 makes the walks of every stage as long as that of stage 1, and takes all stages from four ranks to two.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from safetensors.torch import load_file

from data_prep.manifest import Manifest
from pipeline.checkpoints.files import read_meta
from pipeline.config.load import load
from pipeline.data.opened import training_order
from tests.support.datasets import Datasets, has_ffcv, needs_ffcv
from tests.support.jobs import Job, Recorded, launch_jobs
from tests.support.runs import log_of, small_run

STAGES = (0, 1, 2, 3)
STEPS = {stage: int(os.environ.get("RESUME_STEPS", 54 if stage == 1 else 18)) for stage in STAGES}
SHRUNK_STAGES = STAGES if "RESUME_STEPS" in os.environ else (1, 3)
SAME, ONE, TWO, SHRUNK = 4, 8, 12, 7  # where a walk goes on: with as many ranks, with one, with two; with two of four
FFCV_STEPS, FFCV_CUT = 7, 3
GRAPHS = "model.cuda_graphs=true"
pytestmark = pytest.mark.timeout(3600)  # the fixture's share, and of a busy machine


@dataclass(frozen=True)
class Runs(Recorded):
    datasets: Datasets

    def job(self, name: str, stage: int, *more: str, steps: int = 54, data: str = "webdataset", **fate: Any) -> Job:
        """A run with all that has state: layer decay and no-decay groups, accumulation, clipping, EMA, mixup, cutmix,
        drop path, checkpointing. `steps` are a multiple of the six of an epoch."""
        epochs = -(-steps // 6)
        options = (f"name={name}", f"train.zero_stage={stage}", f"data.format={data}", f"train.epochs={epochs}")
        options += (f"evaluate.every_epochs={epochs}", "optimizer.layer_decay=0.8", "model.drop_path_rate=0.2")
        options += ("augment.mixup_alpha=0.4", "augment.cutmix_alpha=0.5", "tracking.log_every_steps=6")
        options += (
            f"checkpoint.keep_every_steps={ONE}",
            f"checkpoint.every_steps={ONE}",
            f"data.workers_per_rank={1 if data == 'ffcv' else 0}",
        )
        return {"arguments": small_run(self.datasets, self.root, *options, *more), **fate}


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system of 60 MB: room for a checkpoint of 16 MB beside the 32 MB that a save leaves free, not for two."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=60m", "none", folder], capture_output=True, check=False
    )
    yield folder if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def runs(datasets: Datasets, small_disk: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Per stage an undisturbed run on two ranks, one walk 2 -> 2 -> 1 -> 2, one 4 -> 2, and FFCV's two; and faults."""
    found = Runs(tmp_path_factory.mktemp("resume"), datasets)

    def walk(name: str, stop: int | None, stages: Iterable[int] = STAGES) -> list[Job]:
        return [found.job(f"{name}-{stage}", stage, steps=STEPS[stage], stop_at=stop) for stage in stages]

    def ffcv(name: str) -> list[Job]:
        more = (f"checkpoint.every_steps={FFCV_CUT}", f"checkpoint.keep_every_steps={FFCV_CUT}")
        options: dict[str, Any] = {
            "data": "ffcv",
            "steps": 12,
            "stop_at": FFCV_STEPS,
        }  # stopped: they are not evaluated
        return [found.job(f"{name}-{stage}", stage, *more, **options) for stage in STAGES] if has_ffcv() else []

    row = ("guard.steps_in_a_row=3", "guard.rewinds_max=1", "checkpoint.keep_last=3")
    faults = [
        found.job("faults", 1, nan=[10], loud=[32], stop_at=36),
        found.job("rewind", 2, "guard.mode=rewind", *row, nan=[20, 21, 22], stop_at=26),
        found.job("hopeless", 0, *row, nan=[3, 4, 5], raises="GuardError"),
        found.job("damaged", 0, steps=STEPS[0], stop_at=10),
        found.job("unmeasured", 0, steps=6, stop_at=6),  # in its last step: to be evaluated by the next try
    ]
    on_disk = [] if small_disk is None else [found.job("disk", 0, f"output_root={small_disk}", steps=STEPS[0])]
    launch_jobs(4, found.root, walk("shrunk", SHRUNK, SHRUNK_STAGES))
    first = walk("whole", None) + walk("walk", SAME) + ffcv("ffcv-whole")
    first += [found.job("graphs-whole", 1, GRAPHS, steps=6), found.job("graphs-cut", 1, GRAPHS, steps=6, stop_at=SAME)]
    said = launch_jobs(2, found.root, first + faults + [{**job, "raises": "CheckpointError"} for job in on_disk])
    (found.root / "said.txt").write_text(said)

    newest = found.folder("damaged", 10) / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    if small_disk is not None:
        subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    for stage in STAGES if has_ffcv() else ():  # as if it had been killed after its first checkpoint
        first_checkpoint = found.folder(f"ffcv-cut-{stage}", FFCV_CUT)
        shutil.copytree(found.folder(f"ffcv-whole-{stage}", FFCV_CUT), first_checkpoint)
        meta = json.loads((first_checkpoint / "checkpoint.json").read_text())
        meta["config"]["name"] = f"ffcv-cut-{stage}"
        (first_checkpoint / "checkpoint.json").write_text(json.dumps(meta))
    second = walk("walk", ONE) + walk("shrunk", None, SHRUNK_STAGES) + ffcv("ffcv-cut")
    second += [found.job("graphs-cut", 1, GRAPHS, steps=6)]
    said = launch_jobs(
        2, found.root, [*second, *on_disk, found.job("damaged", 0, steps=STEPS[0]), found.job("unmeasured", 0, steps=6)]
    )
    (found.root / "said-later.txt").write_text(said)
    launch_jobs(1, found.root, walk("walk", TWO))
    launch_jobs(2, found.root, walk("walk", None))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_same_ranks_are_bit_equal(runs: Runs, stage: int) -> None:
    """After a stop within an epoch: every later loss and norm, and all state then, to the last bit."""
    whole, walk = runs.lines(f"whole-{stage}"), runs.lines(f"walk-{stage}")
    assert [line.exact for line in walk[:ONE]] == [line.exact for line in whole[:ONE]]
    assert len(whole) == STEPS[stage]
    assert runs.bit_equal(f"walk-{stage}", f"whole-{stage}", ONE)


def test_cuda_graphs_are_bit_equal_too(runs: Runs) -> None:
    """Their eager twin, as there is no GPU: masks in place of samples left out, and otherwise the same run."""
    whole, cut = runs.lines("graphs-whole"), runs.lines("graphs-cut")
    assert [line.exact for line in cut] == [line.exact for line in whole]
    assert runs.bit_equal("graphs-cut", "graphs-whole", 6)
    without = runs.lines("whole-1")[:6]
    assert [line.samples for line in whole] == [line.samples for line in without]
    assert [line.exact for line in whole] != [line.exact for line in without]
    # Not the schedule of so short a run: but in the first step, whose loss is before any update.
    assert whole[0].loss == pytest.approx(without[0].loss, rel=1e-5)


@needs_ffcv
@pytest.mark.parametrize("stage", STAGES)
def test_ffcv_is_bit_equal_too(runs: Runs, stage: int) -> None:
    whole, cut = runs.lines(f"ffcv-whole-{stage}"), runs.lines(f"ffcv-cut-{stage}")
    assert [line.exact for line in cut] == [line.exact for line in whole[FFCV_CUT:]]
    assert len(whole) == FFCV_STEPS
    assert runs.bit_equal(f"ffcv-cut-{stage}", f"ffcv-whole-{stage}", FFCV_STEPS)
    # Both formats train on the same samples.
    assert [line.samples for line in whole] == [line.samples for line in runs.lines(f"whole-{stage}")[:FFCV_STEPS]]


@pytest.mark.parametrize(
    ("walk", "stage"), [("walk", stage) for stage in STAGES] + [("shrunk", stage) for stage in SHRUNK_STAGES]
)
def test_other_numbers_of_ranks(runs: Runs, walk: str, stage: int) -> None:
    """2 -> 1 -> 2 and 4 -> 2: the same samples at every step, each once an epoch; losses to 1e-5; all state."""
    whole, walked = runs.lines(f"whole-{stage}"), runs.lines(f"{walk}-{stage}")
    assert {line.ranks for line in walked} == ({1, 2} if walk == "walk" else {2, 4})
    assert [line.step for line in walked] == list(range(STEPS[stage]))
    config = load(runs.root / f"whole-{stage}" / "config.yaml")
    order = training_order(config, Manifest.load(config.data.path))
    for line, other in zip(whole, walked, strict=True):
        assert line.samples == other.samples
        assert other.loss == pytest.approx(line.loss, rel=1e-5)
    for first in range(0, STEPS[stage], order.steps_per_epoch):
        seen = [sample for line in walked[first : first + order.steps_per_epoch] for sample in line.samples]
        assert len(seen) == len(set(seen)) == order.steps_per_epoch * order.global_batch
    ours, theirs = runs.tensors(f"{walk}-{stage}", STEPS[stage]), runs.tensors(f"whole-{stage}", STEPS[stage])
    for key, value in theirs.items():
        # A layer with another group's rate or decay would be off by tens of percent.
        assert (ours[key] - value).norm() <= 2e-3 * value.norm() + 1e-7, key


@pytest.mark.parametrize("stage", [stage for stage in STAGES[1:] if STEPS[stage] == STEPS[0]])
def test_stages_are_the_same_run(runs: Runs, stage: int) -> None:
    losses, first = ([line.loss for line in runs.lines(f"whole-{which}")] for which in (stage, 0))
    assert losses == pytest.approx(first, rel=1e-4)


def test_a_nan_and_a_loud_batch_are_left_out(runs: Runs) -> None:
    """Neither reaches the weights; the ledger names their samples and where the net goes wrong; MLflow counts them."""
    run = runs.root / "faults"
    whole, lines = runs.lines("whole-1"), runs.lines("faults")
    assert [line.exact for line in lines[:9]] == [line.exact for line in whole[:9]]
    assert math.isnan(lines[9].loss)
    assert lines[31].loss > 20
    assert all(math.isfinite(line.loss) and line.loss < 5 for line in lines if line.step not in (9, 31))
    ledger = [json.loads(line) for line in (run / "guard.jsonl").read_text().splitlines()]
    assert [record["step"] for record in ledger] == [10, 32]
    assert [tuple(record["samples"]) for record in ledger] == [lines[9].samples, lines[31].samples]
    assert "not finite" in ledger[0]["reason"]
    assert "robust deviations" in ledger[1]["reason"]
    worst = ledger[0]["parts"][0]
    assert worst["rank"] == 1
    assert worst["stages"][0]["non_finite"] > 0
    assert set(worst["samples"]) < set(lines[9].samples)
    meta = read_meta(runs.folder("faults", 36))
    assert (meta.updates, meta.guard["skipped"]) == (34, 2)
    logged = log_of(runs.root, "faults")[-1]
    assert (logged["skipped_steps"], logged["rewinds"], logged["guard_in_a_row"]) == (2, 0, 0)
    client = mlflow.MlflowClient(f"sqlite:///{runs.root}/mlflow.db")
    (found,) = client.search_runs(["1"], "attributes.run_name = 'faults'")
    assert found.data.metrics["skipped_steps"] == 2
    assert {item.path for item in client.list_artifacts(found.info.run_id)} >= {"guard.jsonl", "events.txt"}


def test_a_row_of_bad_steps_rewinds(runs: Runs) -> None:
    """Back to the weights of step 16, past the batches up to step 22, and on; and that point is itself a checkpoint."""
    assert runs.lines("rewind")[-1].step == 25
    before, after = runs.tensors("rewind", 16), runs.tensors("rewind", 22)
    assert all(torch.equal(before[key], after[key]) for key in before)
    meta = read_meta(runs.folder("rewind", 22))
    assert (meta.updates, meta.guard["rewinds"], meta.guard["in_a_row"]) == (16, 1, 0)
    assert read_meta(runs.folder("rewind", 26)).updates == 20
    later = runs.tensors("rewind", 26)
    assert any(not torch.equal(before[key], later[key]) for key in before)
    events = (runs.root / "rewind" / "events.txt").read_text()
    assert "REWOUND to the weights of step-00000016 after 3 steps" in events
    assert "the batches of steps 17 to 22 are passed over" in events


def test_a_run_beyond_help_ends(runs: Runs) -> None:
    raised = (runs.root / "hopeless" / "raised.txt").read_text()
    assert "3 steps in a row were left out" in raised
    assert "guard.mode=rewind" in raised
    client = mlflow.MlflowClient(f"sqlite:///{runs.root}/mlflow.db")
    (found,) = client.search_runs(["1"], "attributes.run_name = 'hopeless'")
    assert found.info.status == "FAILED"


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(runs: Runs) -> None:
    """Once, in the log and in the checkpoint, although there was no step left to train."""
    meta = read_meta(runs.folder("unmeasured", 6))
    assert (meta.metrics_step, meta.metrics["val_samples"]) == (6, 28)
    lines = [json.loads(line) for line in (runs.root / "unmeasured" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "top1" in line] == [6]
    assert [line.step for line in runs.lines("unmeasured")] == list(range(6))


def test_a_truncated_checkpoint_is_passed_over(runs: Runs) -> None:
    """The newest lacks a byte: the one before it is taken, with a warning that names both; the end is the same."""
    said = (runs.root / "said-later.txt").read_text()
    (line,) = [line for line in said.splitlines() if "damaged" in line and "step-00000010" in line]
    assert "optimizer.safetensors" in line
    assert "step-00000008" in line
    assert (runs.root / "damaged" / "checkpoints" / "damaged-step-00000010").is_dir()
    assert runs.bit_equal("damaged", "whole-0", STEPS[0])


def test_a_full_disk_loses_nothing(runs: Runs, small_disk: Path | None) -> None:
    """The run goes on without a checkpoint and says so; with room again, the same command ends bit-equal."""
    if small_disk is None:
        pytest.skip("a tmpfs cannot be mounted here")
    said = (runs.root / "said.txt").read_text()
    assert "CHECKPOINT NOT WRITTEN: step 16: " in said
    assert "training goes on; the newest checkpoint is step-00000008" in said
    assert "could not be written: free some space" in (small_disk / "disk" / "raised.txt").read_text()
    end = STEPS[0]
    ours = load_file(small_disk / "disk" / "checkpoints" / f"step-{end:08d}" / "model.safetensors")
    theirs = load_file(runs.folder("whole-0", end) / "model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    lines = [json.loads(line) for line in (small_disk / "disk" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(6, end + 1, 6))
