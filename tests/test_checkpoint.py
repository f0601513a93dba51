"""Checkpoints on disk, and starting from other weights: the head by WordNet id, filters resized, damage named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_prep.labels import imagenet_1k_synsets, published_hornet_22k_synsets
from pipeline import checkpoint, transfer
from pipeline.checkpoint import CheckpointError, differing_keys, locate, newest, read_meta, read_tensors
from pipeline.config import Config, load
from pipeline.recipe import build_model

SYNSETS = ["n02084071", "n02121620", "n02958343"]


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
    meta = checkpoint.Meta(
        step=10,
        samples_seen=640,
        skipped_steps=1,
        seconds=1.0,
        num_classes=3,
        synsets=SYNSETS,
        dataset_id="0" * 32,
        metrics={"top1": 1.0},
        config=config.model_dump(mode="json"),
    )
    (path / "checkpoint.json").write_text(meta.model_dump_json())
    return path


def test_head_follows_wordnet_ids(config: Config, saved: Path) -> None:
    """Shuffled classes, one of them new, at another resolution: rows, filters and body land where they belong."""
    source = transfer.find_source(config.init.model_copy(update={"checkpoint": saved, "weights": "model"}))
    target = ["n07739125", "n02958343", "n02084071"]
    model = build_model(config.model, 3, 96)
    fresh = model.head.weight[0].detach().clone()
    report = transfer.load_into(model, source, target)
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
    assert "1000 of 1000" in transfer.load_into(target, transfer.find_source(init), imagenet_1k_synsets())
    space = published_hornet_22k_synsets()
    assert [space[int(row)] for row in target.head.weight[:, 0]] == imagenet_1k_synsets()
    unsaid = init.model_copy(update={"label_space": "checkpoint"})
    with pytest.raises(CheckpointError, match=r"published\.pth does not say which classes its head has"):
        transfer.find_source(unsaid)
    wrong = init.model_copy(update={"label_space": "imagenet-1k"})
    with pytest.raises(CheckpointError, match="head of 10459 classes, its label space 1000"):
        transfer.load_into(target, transfer.find_source(wrong), imagenet_1k_synsets())


def test_what_does_not_fit_is_named(config: Config, saved: Path, tmp_path: Path) -> None:
    given = read_tensors(saved / "model.safetensors")
    del given["norm.weight"]
    given["stages.0.0.gamma1"] = torch.zeros(7)
    given["extra"] = torch.zeros(1)
    save_file(given, tmp_path / "odd.safetensors")
    source = transfer.Source(tmp_path / "odd.safetensors", None, None)
    with pytest.raises(CheckpointError, match=r"lacks norm\.weight; has extra, .*gamma1 is \(7,\)"):
        transfer.load_into(build_model(config.model, 3, 64), source, SYNSETS)
    with pytest.raises(CheckpointError, match=r"has no ema\.safetensors: set init\.weights=model"):
        transfer.find_source(config.init.model_copy(update={"checkpoint": saved}))
    other = transfer.Source(saved, "hornet_base_gf", None)
    transfer.check_model(other, "hornet_base_gf_img384")
    with pytest.raises(CheckpointError, match="is a checkpoint of hornet_base_gf, the configuration builds"):
        transfer.check_model(other, "hornet_tiny_gf")


def test_damage_and_absence(config: Config, saved: Path, tmp_path: Path) -> None:
    assert locate(config.run_dir) == saved == newest(saved.parent)
    (saved.parent / ".tmp-step-00000020").mkdir()  # a save that was killed does not count
    assert newest(saved.parent) == saved
    with pytest.raises(CheckpointError, match="neither a run folder"):
        locate(tmp_path / "nothing")
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged.*remove the folder"):
        read_tensors(saved / "model.safetensors")
    (saved / "checkpoint.json").write_text('{"step": 1')
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is damaged"):
        read_meta(saved)


def test_what_makes_it_another_run(config: Config, saved: Path) -> None:
    found, meta = checkpoint.newest_of_run(config, "0" * 32, resume=True)
    assert found == saved
    assert meta is not None
    tree = json.loads(json.dumps(meta.config))
    tree["train"] |= {"zero_stage": 3, "micro_batch": 8}  # how it runs is free; what it computes is not
    same = Config.model_validate(tree)
    assert checkpoint.newest_of_run(same, "0" * 32, resume=True)[0] == saved
    tree["optimizer"]["lr_peak"] = 1.0
    with pytest.raises(CheckpointError, match=r"optimizer\.lr_peak was 0\.0015, is 1\.0"):
        checkpoint.newest_of_run(Config.model_validate(tree), "0" * 32, resume=True)
    with pytest.raises(CheckpointError, match=r"data\.path \(dataset_id\) was"):
        checkpoint.newest_of_run(config, "1" * 32, resume=True)
    assert differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}, "d": 3}) == {"a.c": (2, None), "d": (None, 3)}
