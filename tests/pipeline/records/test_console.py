"""The meter against a clock that the test turns, the ETA, and the lines a person reads; what a model computes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from data_prep.manifest import Manifest, Split
from pipeline.config.load import load
from pipeline.config.sections import Model
from pipeline.ranks.collectives import Ranks
from pipeline.records import console as report
from pipeline.records import flops
from pipeline.records.console import classification_rows, evaluation_line, interrupted_line, print_plan, step_line
from pipeline.records.meter import Eta, Meter

CPU = torch.device("cpu")
LOGGED = {
    "loss": 6.54321,
    "epoch": 1.5,
    "lr": 1e-3,
    "grad_norm": 0.876,
    "images_per_second": 2345.6,
    "data_wait": 0.02,
    "data_wait_max": 0.02,
    "memory_gb": 41.23,
    "bad_samples": 0.0,
    "skipped_steps": 0,
    "guard_in_a_row": 0,
    "rewinds": 0,
    "checkpoints_failed": 0,
}


@dataclass
class Clock:
    """`time.monotonic`, in seconds that the test adds."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    yield clock
    monkeypatch.undo()  # before pytest-timeout reads the clock


def with_other_rank(waited: float, bad: float, memory_gb: float) -> dict[str, object]:
    """Reductions over this rank and one other, which has read these."""
    return {
        "ranks": Ranks(0, 2),
        "reduce_sum": lambda mine: mine + torch.tensor([waited, bad], dtype=mine.dtype),
        "reduce_max": lambda mine: torch.maximum(mine, torch.tensor([waited, memory_gb], dtype=mine.dtype)),
    }


def test_meter_over_two_ranks(clock: Clock) -> None:
    """Ten seconds of four steps, one left out, behind a pause; a step of 64 images at 2 pixels and 3 at 3 pixels."""
    others = with_other_rank(waited=0.5, bad=3, memory_gb=1e6)
    meter = Meter(64, device=CPU, flops_per_image=lambda px: 10.0**px, peak_flops=4000.0, **others)
    with meter.paused():
        clock.now += 100
    with meter.waiting():
        clock.now += 1
    clock.now += 9
    meter.add(2.0, 2)
    meter.add(4.0, 3)
    meter.skip(3)
    meter.add(3.0, 3)
    assert meter.read(7, bad_samples=2) == {
        "loss": 3.0,
        "samples_seen": 7 * 64,
        "images_per_second": pytest.approx(4 * 64 / 10),
        "data_wait": pytest.approx((0.1 + 0.5) / 2),
        "data_wait_max": 0.5,
        "bad_samples": 5.0,
        "memory_gb": 1e6,
        "mfu": pytest.approx((64 * 100 + 3 * 64 * 1000) / 10 / 2 / 4000),
    }
    # And all of it anew.
    clock.now += 4
    meter.skip(2)
    read = meter.read(8, bad_samples=2)
    assert math.isnan(read["loss"])
    assert read["images_per_second"] == pytest.approx(16)
    assert read["data_wait"] == 0.25
    clock.now += 1
    meter.add(math.inf, 2)
    meter.add(1.0, 2)
    assert meter.read(10, 2)["loss"] == math.inf


def test_meter_of_a_cpu(clock: Clock) -> None:
    """No MFU; memory is that of the process, at its peak."""
    meter = Meter(8, Ranks(), CPU, lambda mine: mine, lambda mine: mine, lambda px: 1.0, flops.peak_flops(CPU, True))
    clock.now += 2
    meter.add(1.0, 32)
    read = meter.read(1, 0)
    assert "mfu" not in read
    status = Path("/proc/self/status").read_text().splitlines()
    resident_kb = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    assert resident_kb * 1024 / 1e9 * 0.99 < read["memory_gb"] < 64


def test_eta_follows_the_newest_windows() -> None:
    eta = Eta()
    assert math.isnan(eta.left(10))
    eta.add(50, 100.0)
    eta.add(0, 100.0)
    assert eta.left(10) == pytest.approx(20)
    for _ in range(40):  # on a machine four times as fast
        eta.add(50, 25.0)
    assert eta.left(1000) == pytest.approx(500, rel=0.02)
    eta.add(50, 5000.0)  # a stall: 200 times the typical counts as 3 times
    assert 500 < eta.left(1000) < 600
    for _ in range(10):
        eta.add(7, 7.0)
    assert 800 < eta.left(1000) < 1000
    assert eta.left(0) == 0


def test_eta_of_a_resumed_run() -> None:
    """What the run took before is where the estimate begins, and one window among others."""
    eta = Eta()
    eta.add(100_000, 200_000.0)
    assert eta.left(10) == pytest.approx(20)
    for _ in range(20):
        eta.add(50, 25.0)
    assert eta.left(10) == pytest.approx(5, rel=0.1)


def test_step_line() -> None:
    line = step_line(1200, 300000, LOGGED, 2 * 86400 + 3 * 3600 + 10 * 60 + 9)
    assert line == (
        "step   1200/300000  ETA 2 d 03:10  epoch 1.50  loss 6.5432  lr 1.00e-03  grad 0.88  2346 images/s  "
        "data wait 2%  41.2 GB"
    )
    gpu = step_line(1, 9, {**LOGGED, "mfu": 0.4123, "data_wait_max": 0.3}, 3 * 3600 + 4 * 60 + 5.9)
    assert gpu.startswith("step 1/9  ETA 3:04:05  ")
    assert "2346 images/s  MFU 41.2%  data wait 2% (slowest rank 30%)  41.2 GB" in gpu
    assert "ETA ?  " in step_line(1, 9, LOGGED, math.nan)
    bad = {"bad_samples": 3.0, "skipped_steps": 2, "rewinds": 1, "checkpoints_failed": 4, "loss": math.nan}
    assert step_line(1, 9, {**LOGGED, **bad}, 1.0).endswith(
        "41.2 GB  BAD SAMPLES 3  SKIPPED UPDATES 2  REWINDS 1  CHECKPOINTS NOT WRITTEN 4"
    )


def test_lines_of_evaluation_and_end() -> None:
    metrics = {"top1": 81.234, "top5": 95.0, "val_loss": 0.9, "val_samples": 500.0}
    assert evaluation_line(7, metrics) == ("step 7  validation: top-1 81.23 %  top-5 95.00 %  loss 0.9000  500 images")
    assert "81.23 % (without EMA 80.00)  top-5" in evaluation_line(7, {**metrics, "top1_model": 80.0})
    assert interrupted_line(7, 90, "SIGUSR1", Path("runs/a/step_7")) == (
        "stopped (SIGUSR1) with 83 of 90 steps to go: checkpoint runs/a/step_7; the same command goes on"
    )
    assert "no checkpoint was written" in interrupted_line(7, 90, "SIGTERM", None)


def test_plan_tells_the_guard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "Console", lambda **_: Console(width=400))
    split = Split(samples=4, class_counts=[4], shards=[{"file": "a", "samples": 4, "bytes": 1, "sha256": "0" * 64}])
    manifest = Manifest(name="few", dataset_id="x", synsets=["n00000001"], splits={"train": split, "val": split})

    def plan(*overrides: str) -> str:
        config = load("configs/demo_pretrain.yaml", ["guard.stall_seconds=600", *overrides])
        subject = classification_rows(config, manifest, 10**6)
        print_plan("pretrain", config, subject, 100, 1, "cpu, fp32", "resumed from step 7")
        rows = dict(row.strip(" │").split("│") for row in capsys.readouterr().out.splitlines() if "│" in row)
        told = {key.strip(): value.strip() for key, value in rows.items()}
        assert told["weights"] == "resumed from step 7"
        return told["guard"]

    stall = "the run ends after 600 s without progress"
    numbers = ("guard.z_max=8", "guard.window_steps=100", "guard.steps_in_a_row=20", "guard.rewinds_max=3")
    beyond = "no update beyond 8 deviations of the last 100 steps; after 20 in a row"
    assert plan("guard.mode='off'") == f"off, but after 10 updates in a row that are not finite the run ends; {stall}"
    assert plan("guard.mode=skip", *numbers) == f"skip: {beyond} the run ends; {stall}"
    assert plan("guard.mode=rewind", *numbers) == f"rewind: {beyond} at most 3 rewinds; {stall}"


@pytest.mark.parametrize(
    ("name", "resolution", "published"),
    [("hornet_tiny_7x7", 224, 3.98e9), ("hornet_large_7x7", 224, 34.8e9), ("hornet_large_gf_img384", 384, 101.8e9)],
)
def test_multiply_accumulates(name: str, resolution: int, published: float) -> None:
    """The published number, less the FFT in a GF model; checkpointing and drop path add nothing."""
    model = Model(name=name, drop_path_rate=0.2, layer_scale_init=1e-6, checkpointing="block", compile=False)
    counted = flops.macs_per_image(model, 10459, resolution)
    assert counted == pytest.approx(published, rel=0.005)
    assert flops.training_flops_per_image(model, 10459, resolution) == 6 * counted


def test_peaks() -> None:
    assert flops.peak_flops(CPU, bf16=True) is None
    listed = flops.listed_peak
    sxm, pcie = listed("NVIDIA H100 80GB HBM3", True), listed("NVIDIA H100 PCIe", True)
    assert (sxm, pcie, listed("NVIDIA H200", True)) == (989.4e12, 756.5e12, 989.4e12)
    assert (listed("NVIDIA A100-SXM4-80GB", True), listed("NVIDIA A10", True)) == (312e12, 125e12)
    assert listed("Tesla V100-SXM2-16GB", True) == 15.7e12
    # Others are measured: neither an A10 nor a whole H100.
    assert listed("NVIDIA A10G", True) is listed("NVIDIA H100 80GB HBM3 MIG 1g.10gb", True) is None
    assert listed("NVIDIA A100-SXM4-80GB", False) == 19.5e12
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32
    try:
        assert listed("NVIDIA A100-SXM4-80GB", False) == 156e12
    finally:
        torch.set_float32_matmul_precision(before)
    random_state = torch.get_rng_state()
    assert 1e6 < flops.measured_peak(CPU, bf16=False, side=128) < 1e15
    assert torch.equal(torch.get_rng_state(), random_state)
