"""Checkpoints on disk: damage found, the next good one taken, what is kept; and starting from other weights."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from data_prep.labels.spaces import imagenet_1k_synsets, published_hornet_22k_synsets
from pipeline.checkpoints import choice
from pipeline.checkpoints.choice import differing_keys, newest_of_run
from pipeline.checkpoints.files import (
    CheckpointError,
    Meta,
    best_of,
    find_rewind,
    locate,
    read_meta,
    reasons_to_keep,
    record,
    to_keep,
    verify,
)
from pipeline.checkpoints.state import CheckpointWriter, read_tensors
from pipeline.checkpoints.transfer import load_into
from pipeline.config.load import Config, load
from pipeline.config.sections import Checkpoint
from pipeline.models.build import build_model
from tests.support.checkpoints import DATASET, SYNSETS, TinyEngine, cut, flip_a_bit, meta_at


def save_steps(folder: Path, config: Config, *steps: int, **values: Any) -> list[Path]:
    """Checkpoints of the tiny engine as its run would write them, all of them kept."""
    writer, engine = CheckpointWriter(folder, Checkpoint(keep_last=100), 0), TinyEngine()
    for engine.step in steps:
        writer.save(engine, meta_at(engine.step, config, **values))
        assert writer.wait()
    return [folder / f"step-{step:08d}" for step in steps]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load("configs/demo_finetune.yaml", [f"output_root={tmp_path}"])


@pytest.fixture
def saved(config: Config) -> Path:
    """A checkpoint folder of a 3-class nano model at 64 px, as `save` lays it out."""
    path = config.run_dir / "checkpoints" / "step-00000010"
    path.mkdir(parents=True)
    torch.manual_seed(1)
    model = build_model(config.model, 3, 64)
    weights = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    save_file(weights, path / "model.safetensors")
    files = {"model.safetensors": record(path / "model.safetensors")}
    (path / "checkpoint.json").write_text(meta_at(10, config, files=files).model_dump_json())
    return path


def test_head_follows_wordnet_ids(config: Config, saved: Path) -> None:
    """Shuffled classes, one of them new, at another resolution: rows, filters and body land where they belong."""
    source = choice.find_source(config.init.model_copy(update={"checkpoint": saved, "weights": "model"}))
    target = ["n07739125", "n02958343", "n02084071"]
    model = build_model(config.model, 3, 96)
    fresh = model.head.weight[0].detach().clone()
    report = load_into(model, source, target).report
    assert "2 of 3 classes" in report
    assert "1 fresh: n07739125 (apple)" in report
    given = read_tensors(saved / "model.safetensors")
    assert torch.equal(model.head.weight, torch.stack([fresh, given["head.weight"][2], given["head.weight"][0]]))
    assert torch.equal(model.stages[0][0].pwconv1.weight, given["stages.0.0.pwconv1.weight"])
    name = next(key for key in given if key.endswith("complex_weight"))
    small, large = given[name], model.state_dict()[name]
    assert large.shape != small.shape
    torch.testing.assert_close(large[:, 0, 0], small[:, 0, 0])  # align_corners keeps the corners
    torch.testing.assert_close(large[:, -1, -1], small[:, -1, -1])


def test_published_file(config: Config, tmp_path: Path) -> None:
    """A `.pth` of {"model": weights} with the 10,459-class head: each 1K class gets the row of its WordNet id."""
    model = build_model(config.model, 10_459, 64)
    model.head.weight.data[:, 0] = torch.arange(10_459.0)
    torch.save({"model": model.state_dict()}, tmp_path / "published.pth")
    init = config.init.model_copy(update={"checkpoint": tmp_path / "published.pth", "label_space": "published-22k"})
    target = build_model(config.model, 1000, 64)
    assert "1000 of 1000" in load_into(target, choice.find_source(init), imagenet_1k_synsets()).report
    space = published_hornet_22k_synsets()
    assert [space[int(row)] for row in target.head.weight[:, 0]] == imagenet_1k_synsets()
    unsaid = init.model_copy(update={"label_space": "checkpoint"})
    for rows in target.parameters():
        torch.nn.init.zeros_(rows)
    found = load_into(target, choice.find_source(unsaid), imagenet_1k_synsets())
    assert "1000 of 1000 classes from the source by WordNet id (hornet-22k, by its size)" in found.report
    assert [space[int(row)] for row in target.head.weight[:, 0]] == imagenet_1k_synsets()
    odd = build_model(config.model, 777, 64)
    torch.save({"model": odd.state_dict()}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth does not say which classes its head has, and has 777 of them"):
        load_into(target, choice.find_source(unsaid.model_copy(update={"checkpoint": tmp_path / "odd.pth"})), SYNSETS)
    with pytest.raises(CheckpointError, match="head of 10459 classes, its label space 21841"):  # as its name has it
        load_into(target, choice.find_source(init.model_copy(update={"label_space": "fall11"})), SYNSETS)
    wrong = init.model_copy(update={"label_space": "imagenet-1k"})
    with pytest.raises(CheckpointError, match="head of 10459 classes, its label space 1000"):
        load_into(target, choice.find_source(wrong), imagenet_1k_synsets())


def test_what_does_not_fit_is_named(config: Config, saved: Path, tmp_path: Path) -> None:
    given = read_tensors(saved / "model.safetensors")
    del given["norm.weight"]
    given["stages.0.0.gamma1"] = torch.zeros(7)
    given["extra"] = torch.zeros(1)
    save_file(given, tmp_path / "odd.safetensors")
    source = choice.Source(tmp_path / "odd.safetensors", None, None)
    with pytest.raises(CheckpointError, match=r"lacks norm\.weight; has extra, .*gamma1 is \(7,\)"):
        load_into(build_model(config.model, 3, 64), source, SYNSETS)
    with pytest.raises(CheckpointError, match=r"has no ema\.safetensors: set init\.weights=model"):
        choice.find_source(config.init.model_copy(update={"checkpoint": saved}))
    other = choice.Source(saved, "hornet_base_gf", None)
    choice.check_model(other, "hornet_base_gf_img384")
    with pytest.raises(CheckpointError, match="is a checkpoint of hornet_base_gf, the configuration builds"):
        choice.check_model(other, "hornet_tiny_gf")


def test_what_is_no_checkpoint_is_told_by_what_it_is(config: Config, saved: Path, tmp_path: Path) -> None:
    assert locate(saved.parent) == saved  # the folder of a run's checkpoints
    for path, words in (
        (tmp_path / "typo.pth", r"typo\.pth does not exist: it has to be a run folder, one of its checkpoints, or a"),
        (Path("https://host/w.pth"), "is not fetched: download the file, and name it where it is then"),
        (Path("hf-hub:timm/hornet"), "is not fetched: download the file"),
        (config.output_root, rf"it holds runs, name one: {config.name}$"),
    ):
        with pytest.raises(CheckpointError, match=words):
            locate(path)
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"it holds weight files, name one: model\.safetensors$"):
        locate(hub)


def test_damage_and_absence(config: Config, saved: Path, tmp_path: Path) -> None:
    assert locate(config.run_dir) == saved
    (saved.parent / ".tmp-step-00000020").mkdir()  # a save that was killed does not count
    assert locate(config.run_dir) == saved
    for gone in (tmp_path / "nothing", saved.with_name("step-00000011")):
        with pytest.raises(CheckpointError, match="does not exist: it has to be a run folder"):
            locate(gone)
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged.*remove the folder"):
        read_tensors(saved / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 checkpoints, none of them whole: .*model\.safetensors has .* bytes ins"
    ):
        locate(config.run_dir)
    assert locate(saved) == saved  # by its own name: whoever reads it meets the damage
    (saved / "checkpoint.json").write_text('{"step": 1')
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is damaged"):
        read_meta(saved)
    (saved / "checkpoint.json").write_text('{"format_version": 1, "skipped_steps": 0}')
    with pytest.raises(CheckpointError, match="has format_version 1, this code reads 2: use the code that wrote it"):
        read_meta(saved)


def restep(file: Path) -> None:
    file.write_text(file.read_text().replace('"step": 30,', '"step": 31,'))


DAMAGES = [
    (cut, "model.safetensors", "model.safetensors has 4,1.. bytes instead of 4,1.."),
    (flip_a_bit, "optimizer.safetensors", "optimizer.safetensors has the right size but another sha256"),
    (Path.unlink, "ema.safetensors", "ema.safetensors is missing"),
    (cut, "checkpoint.json", "checkpoint.json is damaged: Expecting ',' delimiter"),
    (restep, "checkpoint.json", "checkpoint.json is of step 31"),
    (Path.unlink, "checkpoint.json", "checkpoint.json is missing"),
    (lambda file: file.write_bytes(b"\xff\xfe"), "checkpoint.json", "checkpoint.json is damaged: 'utf-8' codec"),
    (
        lambda file: file.write_text('{"step": "x"}'),
        "checkpoint.json",
        "checkpoint.json is damaged: step: Input should",
    ),
]


@pytest.mark.parametrize(("damage", "name", "fault"), DAMAGES)
def test_the_newest_good_one_is_taken(
    config: Config, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], Any], name: str, fault: str
) -> None:
    folder = config.run_dir / "checkpoints"
    first, good, bad = save_steps(folder, config, 10, 20, 30)
    assert newest_of_run(config, DATASET, True)[0] == find_rewind(folder)[0] == locate(config.run_dir) == bad
    assert capsys.readouterr().err == ""
    damage(bad / name)
    assert re.fullmatch(fault + ".*", verify(bad)[0])
    line = f"warning: checkpoint {re.escape(str(bad))} is damaged: {fault}.*; taking step-00000020 instead"
    found, meta = newest_of_run(config, DATASET, True)
    assert (found, meta.step) == (good, 20)
    assert re.fullmatch(line + "\n", capsys.readouterr().err)
    assert find_rewind(folder)[0] == good
    assert re.fullmatch(line + "\n", capsys.readouterr().err)
    # Only a change that leaves the size needs the checksums.
    assert newest_of_run(config, DATASET, True, hashes=False)[0] == (bad if damage is flip_a_bit else good)
    with pytest.raises(CheckpointError, match=r"already holds a run \(step-00000030\)"):
        newest_of_run(config, DATASET, False)

    damage(good / name)
    if damage is restep:
        return  # it changes step 30 alone
    assert newest_of_run(config, DATASET, True)[0] == first
    damage(first / name)
    with pytest.raises(CheckpointError, match=r"has 3 checkpoints, none of them whole: .*step-00000030 is damaged: "):
        newest_of_run(config, DATASET, True, quarantine=True)
    assert sorted(os.listdir(folder)) == ["latest", "step-00000010", "step-00000020", "step-00000030"]
    assert find_rewind(folder) is None


def test_damaged_ones_are_set_aside(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config.run_dir / "checkpoints"
    old, good, bad, worse = save_steps(folder, config, 10, 20, 30, 40)
    cut(old / "model.safetensors")  # older than what is taken: nobody's business
    for damaged in (bad, worse):
        flip_a_bit(damaged / "model.safetensors")
    (folder / "damaged-step-00000040").mkdir()
    other = config.model_copy(update={"seed": 99})
    with pytest.raises(CheckpointError, match="is of another configuration: seed"):
        newest_of_run(other, DATASET, True, quarantine=True)
    assert bad.exists()
    assert newest_of_run(config, DATASET, True, quarantine=True)[0] == good
    told = capsys.readouterr().err.splitlines()
    assert [re.search(r"step-\d+", line)[0] for line in told] == [worse.name, bad.name]
    assert all(line.endswith("taking step-00000020 instead; it is kept as damaged-step-...") for line in told)
    names = {path.name for path in folder.iterdir() if not path.is_symlink()}
    assert names == {old.name, good.name, "damaged-step-00000030", "damaged-step-00000040"}
    assert (folder / "damaged-step-00000040" / "checkpoint.json").exists()
    assert newest_of_run(config, DATASET, True, quarantine=True)[0] == good
    assert capsys.readouterr().err == ""
    assert save_steps(folder, config, 30) == [bad]
    assert not verify(bad)
    assert (folder / "damaged-step-00000030").exists()


def test_what_a_rewind_goes_back_to(config: Config) -> None:
    folder = config.run_dir / "checkpoints"
    assert find_rewind(folder) is None
    save_steps(folder, config, 10, 20)
    save_steps(folder, config, 30, guard={"in_a_row": 2})
    path, meta = find_rewind(folder)
    assert (path.name, meta.step) == ("step-00000020", 20)
    assert newest_of_run(config, DATASET, True)[0].name == "step-00000030"


METAS = st.lists(
    st.tuples(st.integers(1, 60), st.sampled_from([None, math.nan, 1.0, 2.0, 3.0]), st.integers(0, 1), st.booleans()),
    unique_by=lambda drawn: drawn[0],
    max_size=12,
).map(
    lambda drawn: [
        meta_at(
            step,
            metrics={} if value is None else {"top1": value, "val_loss": value},
            metrics_step=step if own else step - 1,
            guard={"in_a_row": in_a_row},
        )
        for step, value, in_a_row, own in sorted(drawn)
    ]
)
SETTINGS = st.builds(
    Checkpoint,
    keep_last=st.integers(1, 4),
    keep_every_steps=st.sampled_from([None, 1, 7, 20]),
    best_metric=st.sampled_from([None, "top1", "val_loss", "top5"]),
)


@given(METAS, SETTINGS)
@settings(max_examples=200, deadline=None)
def test_retention(metas: list[Meta], options: Checkpoint) -> None:
    """Saves one after the other, each followed by what retention deletes: nothing is lost that is still wanted."""
    kept: list[Meta] = []
    for number, meta in enumerate(metas):
        kept = [*kept, meta]
        steps = to_keep(kept, options)
        kept = [one for one in kept if one.step in steps]
        seen = metas[: number + 1]
        last = {one.step for one in seen[-options.keep_last :]}
        every = {one.step for one in seen if options.keep_every_steps and one.step % options.keep_every_steps == 0}
        healthy = {one.step for one in seen if one.guard["in_a_row"] == 0}
        values = [
            (one.metrics[options.best_metric], one.step)
            for one in seen
            if one.metrics_step == one.step and math.isfinite(one.metrics.get(options.best_metric or "", math.nan))
        ]
        best = set()
        if values:
            choose = min if options.best_metric == "val_loss" else max
            top = choose(value for value, _ in values)
            best = {max(step for value, step in values if value == top)}
        assert steps == last | every | best | {max(healthy, default=meta.step)}
        assert {one.step for one in kept} == steps
        found = best_of(kept, options.best_metric)
        assert ({found.step} if found else set()) == best


def test_reasons_are_named() -> None:
    metas = [meta_at(step, metrics={"top1": float(-step)}, metrics_step=step) for step in (10, 20, 30)]
    metas.append(meta_at(35, guard={"in_a_row": 1}))
    metas.append(meta_at(40, guard={"in_a_row": 2}))
    options = Checkpoint(keep_last=2, keep_every_steps=20, best_metric="top1")
    assert reasons_to_keep(metas, options) == {
        10: ["best"],
        20: ["every"],
        30: ["rewind"],
        35: ["last"],
        40: ["last", "every"],
    }


def test_what_makes_it_another_run(config: Config, saved: Path) -> None:
    found, meta = choice.newest_of_run(config, DATASET, resume=True)
    assert found == saved
    assert meta is not None
    tree = json.loads(json.dumps(meta.config))
    # How it runs, and what ends it, is free; what it computes is not.
    tree["train"] |= {"zero_stage": 3, "micro_batch": 8}
    tree["guard"] |= {"z_max": 99.0}
    same = Config.model_validate(tree)
    assert choice.newest_of_run(same, DATASET, resume=True)[0] == saved
    tree["optimizer"]["lr_peak"] = 1.0
    with pytest.raises(CheckpointError, match=r"optimizer\.lr_peak was 0\.0015, is 1\.0"):
        choice.newest_of_run(Config.model_validate(tree), DATASET, resume=True)
    with pytest.raises(CheckpointError, match=r"data\.path \(dataset_id\) was"):
        choice.newest_of_run(config, "1" * 32, resume=True)
    assert choice.newest_of_run(config.model_copy(update={"name": "none-yet"}), DATASET, True) == (None, None)
    assert differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}, "d": 3}) == {"a.c": (2, None), "d": (None, 3)}


def test_a_checkpoint_whose_replacement_was_cut_short_is_put_back(config: Config) -> None:
    folder = config.run_dir / "checkpoints"
    (saved,) = save_steps(folder, config, 10)
    saved.rename(folder / f".tmp-before-{saved.name}")  # a kill between two renames
    (folder / f".tmp-{saved.name}").mkdir()
    assert newest_of_run(config, DATASET, True, quarantine=True)[0] == saved
    assert not verify(saved)
