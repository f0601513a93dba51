"""Bad steps are found, and only those; the verdict survives a resume, the ledger a full disk; the fault is named."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

import pipeline.models  # noqa: F401  registers the models
from data_prep.manifest import Manifest
from pipeline.config.load import Config, load
from pipeline.config.sections import Guard as GuardConfig
from pipeline.data.device_augment import DeviceAugment
from pipeline.data.keyed import view_keys
from pipeline.data.loader import training_batches
from pipeline.data.opened import training_order
from pipeline.data.order import SampleOrder
from pipeline.data.views import Batch
from pipeline.models.build import build_model
from pipeline.models.hornet import HorNet
from pipeline.ranks.collectives import Ranks
from pipeline.training.classification import Classification
from pipeline.training.diagnose import diagnose, incident, incident_line, stage_statistics
from pipeline.training.guard import Guard, GuardState, explain_end
from tests.support.datasets import Datasets
from tests.support.runs import small_run

SETTINGS = GuardConfig(mode="skip", window_steps=50, z_max=8.0, steps_in_a_row=5, rewinds_max=2, stall_seconds=600)


def noisy(count: int, level: float, spread: float, seed: int = 0) -> list[float]:
    return (level * np.random.default_rng(seed).normal(1, spread, count)).tolist()


def settled(config: GuardConfig = SETTINGS, loss: float = 6.9, grad_norm: float = 1.3) -> Guard:
    """A guard that has accepted a full window."""
    guard = Guard(config)
    for pair in zip(noisy(60, loss, 0.002), noisy(60, grad_norm, 0.1, 1), strict=True):
        assert guard.judge(*pair) is None
    return guard


@pytest.mark.parametrize(
    ("loss", "grad_norm", "reason"),
    [
        (math.nan, 1.3, "loss nan is not finite"),
        (math.inf, 1.3, "loss inf is not finite"),
        (6.9, math.inf, "gradient norm inf is not finite"),
        (6.9, math.nan, "gradient norm nan is not finite"),
        (6.9, -1.0, "gradient norm -1.0 is not finite"),
        (690.0, 1.3, "loss 690 is 19"),
        (6.9, 130.0, "gradient norm 130 is 18"),
    ],
)
def test_what_is_left_out(loss: float, grad_norm: float, reason: str) -> None:
    guard = settled()
    before = guard.state
    assert str(guard.judge(loss, grad_norm)).startswith(reason)
    after = guard.state
    assert (after.losses, after.log_grad_norms) == (before.losses, before.log_grad_norms)
    assert (after.skipped, after.in_a_row) == (1, 1)
    assert guard.judge(6.9, 1.3) is None
    assert (guard.state.skipped, guard.state.in_a_row, guard.state.losses[-1]) == (1, 0, 6.9)


def test_off_leaves_out_only_what_is_not_finite() -> None:
    guard = settled(SETTINGS.model_copy(update={"mode": "off"}))
    assert guard.judge(690.0, 130.0) is None
    assert guard.judge(6.9, math.inf) == "gradient norm inf is not finite"
    assert guard.state.skipped == 1


@pytest.mark.parametrize("spread", [0.001, 0.2])  # below the floors, and above
def test_the_limit_is_z_max_robust_deviations(spread: float) -> None:
    """scipy's median absolute deviation, in place of ours; the window is the last 50 of 70 steps."""
    losses, norms = noisy(70, 3.0, spread), np.exp(noisy(70, 1.0, 3 * spread, 1)).tolist()
    calm = SETTINGS.model_copy(update={"z_max": 1e9})
    seen = Guard(calm)
    for pair in zip(losses, norms, strict=True):
        assert seen.judge(*pair) is None
    assert seen.state.losses == losses[-50:]

    def limit(values: np.ndarray, floor: float) -> float:
        return float(np.median(values) + 8 * max(median_abs_deviation(values, scale="normal"), floor))

    window, logs = np.array(losses[-50:]), np.log(norms[-50:])
    worst_loss = limit(window, 0.05 * np.median(window))
    worst_norm = math.exp(limit(logs, 0.25))
    for factor, verdicts in ((0.999, (True, True)), (1.001, (False, False))):
        by_loss = Guard(SETTINGS, seen.state).judge(worst_loss * factor, norms[-1])
        by_norm = Guard(SETTINGS, seen.state).judge(losses[-1], worst_norm * factor)
        assert (by_loss is None, by_norm is None) == verdicts


def test_ordinary_training_is_left_alone() -> None:
    """A falling loss, a level that shifts by 30 % either way, a gradient three times as large, values near 0."""
    guard = Guard(SETTINGS)
    curve = 3 + 7 * np.exp(-np.arange(2000) / 300)
    curve *= np.random.default_rng(0).normal(1, 0.005, 2000)
    curve[700:1200] *= 1.3
    norms = np.full(2000, 0.8)
    norms[900:1500] *= 3
    assert [guard.judge(loss, norm) for loss, norm in zip(curve.tolist(), norms.tolist(), strict=True)] == [None] * 2000
    learnt = Guard(SETTINGS)
    assert all(learnt.judge(loss, norm) is None for loss, norm in 10 * ([(0.0, 0.0)] * 5 + [(0.05, 0.0)]))


def test_no_spike_before_there_is_a_window() -> None:
    guard = Guard(SETTINGS)
    for step in range(20):
        assert guard.judge(100.0**step, 1.0) is None
    guard.forget()
    assert guard.state == GuardState()
    for _ in range(20):
        assert guard.judge(7.0, 1.0) is None
    assert guard.judge(700.0, 1.0) is not None


def test_a_level_that_stays_too_high_is_bounded() -> None:
    guard = settled()
    for left_out in range(1, 6):
        assert not guard.exhausted
        assert guard.judge(69.0, 1.3) is not None
        assert guard.state.in_a_row == left_out
    assert guard.exhausted
    guard.rewound()
    assert not guard.exhausted
    assert guard.state == GuardState(skipped=5, rewinds=1)
    assert [guard.judge(69.0, 1.3) for _ in range(30)] == [None] * 30


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 120), by_pydantic=st.booleans())
def test_a_resumed_run_judges_alike(seed: int, cut: int, by_pydantic: bool) -> None:
    random = np.random.default_rng(seed)
    steps = random.lognormal(1, 0.2, (120, 2))
    steps[random.random((120, 2)) < 0.1] *= 40
    steps[random.random((120, 2)) < 0.03] = np.nan
    whole = Guard(SETTINGS)
    verdicts = [whole.judge(*step) for step in steps.tolist()]
    first = Guard(SETTINGS)
    for step in steps[:cut].tolist():
        first.judge(*step)
    text = first.state.model_dump_json() if by_pydantic else json.dumps(first.state.model_dump(mode="json"))
    second = Guard(SETTINGS, GuardState.model_validate_json(text))
    assert [second.judge(*step) for step in steps[cut:].tolist()] == verdicts[cut:]
    assert second.state == whole.state


def test_the_end_is_explained_in_one_line() -> None:
    state = GuardState(skipped=7, in_a_row=5, rewinds=2)
    ledger = Path("runs/a/incidents.jsonl")
    text = explain_end(SETTINGS, state, 812, "loss 690 is 57", ledger, Path("runs/a/checkpoints/step-00000800"))
    assert "\n" not in text
    for part in ("5 steps in a row", "step 812", "loss 690", str(ledger), "guard.rewinds_max 2", "guard.z_max above 8"):
        assert part in text
    assert "init.checkpoint=runs/a/checkpoints/step-00000800 init.weights=model optimizer.lr_peak=" in text
    fresh = explain_end(SETTINGS, GuardState(in_a_row=5), 4, "loss nan is not finite", ledger, None)
    assert not [part for part in ("z_max", "init.checkpoint", "rewinds", "last good") if part in fresh]


def nano(**options: float) -> HorNet:
    torch.manual_seed(0)
    return timm.create_model("hornet_nano_gf", num_classes=5, layer_scale_init=0.1, **options)


def test_stage_statistics_are_those_of_the_maps() -> None:
    model, images = nano().eval(), torch.randn(2, 3, 64, 64)
    maps: list[torch.Tensor] = []
    for block in model.stages[2]:
        block.gnconv.register_forward_hook(lambda _, __, output: maps.append(output))
    found = stage_statistics(model, images)[2]
    everything = torch.cat([x.flatten() for x in maps]).double()
    assert found["rms"] == pytest.approx(everything.square().mean().sqrt().item(), rel=1e-6)
    assert found["max_abs"] == everything.abs().max().item()
    assert (found["stage"], found["non_finite"], found["first_bad_block"]) == (3, 0, None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("stage", "block", "name", "seen_in"),
    [(2, 1, "gnconv.proj_out.weight", 1), (2, 3, "gnconv.dwconv.complex_weight", 3), (2, 0, "pwconv1.weight", 1)],
)
def test_a_planted_inf_is_located(stage: int, block: int, name: str, seen_in: int, training: bool) -> None:
    model = nano(drop_path_rate=0.1).train(training)
    with torch.no_grad():
        model.stages[stage][block].get_parameter(name).view(-1)[7] = math.inf
    found = stage_statistics(model, torch.randn(2, 3, 64, 64))
    assert [entry["first_bad_block"] for entry in found] == [None, None, seen_in, 0]
    assert [entry["non_finite"] > 0 for entry in found] == [False, False, True, True]
    assert math.isfinite(found[2]["max_abs"])
    assert math.isnan(found[3]["max_abs"])
    assert model.training == training
    part = {"rank": 0, "micro_batch": 0, "loss": math.nan, "samples": [1, 2], "stages": found}
    line = incident_line(incident(5, "loss nan is not finite", math.nan, math.inf, 0, [1, 2], [part]))
    assert line.endswith(f"samples 1, 2  not finite from stage 3, block {seen_in}")


def test_hooks_are_gone_whatever_happens() -> None:
    model = nano()
    stage_statistics(model, torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="at least 32"):
        stage_statistics(model, torch.randn(1, 3, 60, 30))
    assert not [module for module in model.modules() if module._forward_hooks]


def configured(datasets: Datasets, *more: str) -> tuple[Config, Manifest, SampleOrder]:
    arguments = small_run(datasets, Path("unused"), "data.workers_per_rank=2", "model.drop_path_rate=0.5", *more)
    config = load(arguments[1], arguments[2:])
    manifest = Manifest.load(config.data.path)
    return config, manifest, training_order(config, manifest)


@pytest.mark.parametrize(("losses", "worst"), [([2.0, math.nan], 1), ([3.0, 2.0], 0), ([math.inf, math.nan], 0)])
@pytest.mark.parametrize("where", ["host", "device"])
def test_the_worst_micro_batch_is_run_again(datasets: Datasets, where: str, losses: list[float], worst: int) -> None:
    config, manifest, order = configured(datasets, f"augment.where={where}", "train.precision=bf16")
    ranks, step, device = Ranks(1, 2), 8, torch.device("cpu")
    augment = DeviceAugment(config.augment, device)

    def place(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        keys = view_keys(config.seed, batch.views.numpy())
        return augment(batch.images, keys) if where == "device" else batch.images, batch.labels

    torch.manual_seed(1)
    model = build_model(config.model, manifest.num_classes, config.data.resolution).eval()
    arguments = (config, Classification(config, ranks), ranks, step, losses, model, place, device, True)
    part = diagnose(*arguments)
    epoch, in_epoch = divmod(step, order.steps_per_epoch)
    mine = order.rank_steps(epoch, in_epoch, in_epoch + 1, 1, 2)[0][0]
    assert part["samples"] == mine[4 * worst : 4 * worst + 4].tolist()
    assert (part["rank"], part["micro_batch"]) == (1, worst)
    assert part["loss"] is losses[worst]

    batch = list(training_batches(config, manifest, order, ranks, step, step + 1))[worst]
    torch.manual_seed(int(np.random.SeedSequence((config.seed, step, (1 * 2 + worst) * 4)).generate_state(1)[0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert part["stages"] == stage_statistics(model.train(), place(batch)[0])


def test_data_that_cannot_be_read_again_does_not_end_the_run(datasets: Datasets, tmp_path: Path) -> None:
    config, manifest, order = configured(datasets)
    task = Classification(config, Ranks())
    task.config = config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "gone")})})
    model = build_model(config.model, manifest.num_classes, config.data.resolution)
    losses = [1.0, 4.0, math.nan, 2.0]
    arguments = (config, task, Ranks(), 0, losses, model, lambda batch: batch, torch.device("cpu"), False)
    part = diagnose(*arguments)
    assert part["samples"] == order.rank_steps(0, 0, 1, 0, 1)[0][0][8:12].tolist()
    assert part["stages"] == []
    assert str(tmp_path / "gone") in part["error"]
    record = incident(0, "loss nan is not finite", math.nan, 1.0, 0, part["samples"], [part])
    assert f"not looked into: {part['error']}" in incident_line(record)


def test_incident_keeps_the_worst_parts_as_json() -> None:
    stages = [{"stage": i, "rms": 1.0, "max_abs": 2.0 * i, "non_finite": 0, "first_bad_block": None} for i in (1, 2)]
    losses = [2.0, math.nan, 3.0, -math.inf, *(0.1 * i for i in range(8))]
    parts = [
        {"rank": rank, "micro_batch": 0, "loss": loss, "samples": list(range(10)), "stages": stages}
        for rank, loss in enumerate(losses)
    ]
    record = incident(7, "loss inf is not finite", math.inf, -math.inf, 1, np.arange(20), list(reversed(parts)))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert [part["rank"] for part in record["parts"]] == [1, 3, 2, 0, 11, 10, 9, 8]
    assert [part["loss"] for part in record["parts"][:3]] == ["nan", "-inf", 3.0]
    assert (record["loss"], record["grad_norm"], record["samples"]) == ("inf", "-inf", list(range(20)))
    assert incident_line(record) == (
        "LEFT OUT: loss inf is not finite  worst: rank 1 micro-batch 0, samples 0, 1, 2, 3 and 6 more"
        "  largest activation 4 in stage 2"
    )
    assert incident_line({**record, "parts": []}) == "LEFT OUT: loss inf is not finite"
