"""Weights of others: each form of file loads the same, or is refused in one line that says what it holds."""

from __future__ import annotations

import argparse
import collections
import gzip
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from data_prep.labels.spaces import imagenet_1k_synsets
from pipeline.checkpoints.choice import Source, find_source
from pipeline.checkpoints.files import CheckpointError
from pipeline.checkpoints.transfer import check_fit, load_into
from pipeline.config.load import Config, load
from pipeline.config.sections import Init
from pipeline.models.build import build_model
from tests.support.checkpoints import SYNSETS
from tests.support.datasets import Datasets
from tests.support.runs import run_module, small_run

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def config() -> Config:
    return load("configs/demo_finetune.yaml")


@pytest.fixture(scope="module")
def weights(config: Config) -> Tensors:
    """Weights of a 3-class nano model, every one of which bf16 and fp16 hold exactly."""
    torch.manual_seed(1)
    model = build_model(config.model, 3, 64)
    return {name: torch.randint(-64, 64, value.shape) / 64 for name, value in model.state_dict().items()}


def fresh(config: Config) -> nn.Module:
    return build_model(config.model, 3, 64)


def other(weights: Tensors) -> Tensors:
    return {name: torch.zeros_like(value) for name, value in weights.items()}


def prefixed(weights: Tensors, prefix: str) -> Tensors:
    return {prefix + name: value for name, value in weights.items()}


class Scalers(dict[str, Any]):
    """A class of the script that wrote the file."""


GOOD: dict[str, Callable[[Tensors], tuple[Any, str]]] = {
    "bare": lambda w: (w, "weights from"),
    "fp16": lambda w: ({k: v.half() for k, v in w.items()}, ""),
    "bf16": lambda w: ({"model": {k: v.bfloat16() for k, v in w.items()}}, "'model', the only weights in it"),
    "fp64": lambda w: ({k: v.double() for k, v in w.items()}, ""),
    "ema beside model": lambda w: ({"model": other(w), "model_ema": w, "epoch": 3}, "('model_ema')"),
    "timm": lambda w: (
        {"epoch": 1, "arch": "x", "state_dict": other(w), "state_dict_ema": w, "args": argparse.Namespace(lr=0.1)},
        "('state_dict_ema')",
    ),
    "data parallel": lambda w: ({"state_dict": prefixed(w, "module."), "best_acc1": 71.3}, "'state_dict'"),
    "compiled": lambda w: (prefixed(w, "module._orig_mod."), ""),
    "DeepSpeed": lambda w: ({"module": w, "optimizer": None, "global_steps": 7}, "'module'"),
    "Lightning": lambda w: ({"state_dict": prefixed(w, "model."), "hyper_parameters": {"lr": 1e-3}}, "'state_dict'"),
}


@pytest.mark.parametrize("form", GOOD)
def test_forms_of_files(config: Config, weights: Tensors, tmp_path: Path, form: str) -> None:
    content, words = GOOD[form](weights)
    torch.save(content, tmp_path / "theirs.pth")
    model = fresh(config)
    report = load_into(model, Source(tmp_path / "theirs.pth", None, SYNSETS, "ema"), SYNSETS).report
    assert words in report
    assert "3 of 3 classes" in report
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["w.safetensors", "pytorch_model.bin"])
def test_safetensors_by_content(
    config: Config, weights: Tensors, tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    save_file({key: value.to(dtype) for key, value in weights.items()}, tmp_path / name)
    model = fresh(config)
    load_into(model, Source(tmp_path / name, None, SYNSETS), SYNSETS)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_which_weights_of_two(config: Config, weights: Tensors, tmp_path: Path) -> None:
    torch.save({"model": weights, "model_ema": other(weights)}, tmp_path / "both.pth")
    model = fresh(config)
    load_into(model, Source(tmp_path / "both.pth", None, SYNSETS, "model"), SYNSETS)
    assert torch.equal(model.state_dict()["norm.weight"], weights["norm.weight"])
    torch.save({"model_ema": weights}, tmp_path / "ema.pth")
    with pytest.raises(CheckpointError, match=r"holds 'model_ema' and no weights without EMA: set init\.weights=ema"):
        load_into(model, Source(tmp_path / "ema.pth", None, SYNSETS, "model"), SYNSETS)


def without(weights: Tensors, *names: str, **more: torch.Tensor) -> Tensors:
    return {name: value for name, value in weights.items() if name not in names} | more


def with_head(weights: Tensors, weight: torch.Tensor, bias: torch.Tensor) -> Tensors:
    return {**weights, "head.weight": weight, "head.bias": bias}


def spoilt(weights: Tensors, value: float) -> Tensors:
    bad = weights["norm.weight"].clone()
    bad[3:5] = value
    return {**weights, "norm.weight": bad}


BAD: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "list": (lambda w: [w, 3], r"holds a list of 2, not weights by name: save a model's state_dict\(\)"),
    "one tensor": (lambda w: w["norm.weight"], "holds a Tensor, not weights by name"),
    "no weights": (lambda w: {"epoch": 3, "args": argparse.Namespace()}, "holds no weights: 'epoch', 'args'"),
    "options among weights": (lambda w: {**w, "epoch": 3}, "'epoch' is a int: save the weights alone"),
    "objects": (lambda w: {"model": w, "scaler": Scalers()}, r"Python objects \(.*Scalers\), .*save the weights alone"),
    "whole model": (lambda w: nn.Linear(2, 2), r"Python objects \(.*Linear.*torch\.save\(\{'model': "),
    "numpy": (lambda w: {"model": w, "acc": np.float64(3)}, r"Python objects \(numpy"),
    "bias alone": (lambda w: without(w, "head.weight"), "has head.bias without head.weight: set init.label_space=none"),
    "no head": (lambda w: without(w, "head.weight", "head.bias"), "has no head .*: set init.label_space=none"),
    "wider head": (
        lambda w: with_head(w, torch.zeros(3, 7), torch.zeros(3)),
        r"head\.weight is \(3, 7\), head\.bias \(3,\); the model's head takes \(classes, \d+\)",
    ),
    "other bias": (lambda w: with_head(w, w["head.weight"], torch.zeros(2)), r"head\.bias \(2,\)"),
    "1K head": (
        lambda w: with_head(w, torch.zeros(1000, w["head.weight"].shape[1]), torch.zeros(1000)),
        "a head of 1000 classes, its label space 3: set init.label_space=imagenet-1k",
    ),
    "head of nobody": (
        lambda w: with_head(w, torch.zeros(5, w["head.weight"].shape[1]), torch.zeros(5)),
        "a head of 5 classes, its label space 3: set init.label_space to a text file",
    ),
    "nan": (lambda w: spoilt(w, torch.nan), r"norm\.weight has 2 of \d+ values that are NaN or infinite"),
    "inf in half": (lambda w: {k: v.half() for k, v in spoilt(w, torch.inf).items()}, "NaN or infinite"),
    "integers": (lambda w: {k: (v * 64).to(torch.int8) for k, v in w.items()}, "is int8, no float"),
    "batch norm": (
        lambda w: {"bn1.num_batches_tracked": torch.tensor(3), "bn1.weight": torch.ones(2)},
        r"has none of the model's weights, it has bn1\.num_batches_tracked, bn1\.weight: it is of another kind",
    ),
    "a counter more": (lambda w: {**w, "steps": torch.tensor(3)}, "has steps, which the model lacks"),
    "another family": (lambda w: {"conv1.weight": torch.zeros(1)}, "none of the model's weights, it has conv1.weight"),
    "other width": (
        lambda w: {k: v[:2] if k.endswith("complex_weight") else v for k, v in w.items()},
        "does not fit the model: .*complex_weight",
    ),
    "empty": (lambda w: {}, "holds no weights: nothing"),
}


@pytest.mark.parametrize("fault", BAD)
def test_faults_of_files(config: Config, weights: Tensors, tmp_path: Path, fault: str) -> None:
    """One line each, from the check as from the run, and the model is as it was."""
    make, words = BAD[fault]
    torch.save(make(weights), tmp_path / "theirs.pth")
    source, model = Source(tmp_path / "theirs.pth", None, SYNSETS), fresh(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for attempt in (lambda: load_into(model, source, SYNSETS), lambda: check_fit(config, source, SYNSETS)):
        with pytest.raises(CheckpointError, match=words) as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400 + len(str(tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_no_weight_file(config: Config, weights: Tensors, tmp_path: Path) -> None:
    def refused(name: str, words: str) -> None:
        with pytest.raises(CheckpointError, match=words) as caught:
            check_fit(config, Source(tmp_path / name, None, SYNSETS), SYNSETS)
        assert "\n" not in str(caught.value)

    torch.save(weights, tmp_path / "whole.pth")
    save_file(weights, tmp_path / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(content[: len(content) // 2])
    refused("cut-whole.pth", r"\([\d,]+ bytes\) is neither safetensors nor a whole checkpoint of torch")
    refused("cut-whole.safetensors", "is damaged")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refused("model.safetensors.index.json", "is JSON; where it lists the parts of a model, merge them into one file")
    np.savez(tmp_path / "weights.npz", a=np.zeros(2))
    refused("weights.npz", "is a NumPy archive: save the weights as safetensors")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>")
    refused("page.pth", "is a web page, as one gets in place of a file")
    (tmp_path / "packed.pth").write_bytes(gzip.compress(b"weights"))
    refused("packed.pth", "is compressed by gzip: unpack it")
    (tmp_path / "empty.pth").touch()
    refused("empty.pth", r"\(0 bytes\) is neither")
    with open(tmp_path / "list.pkl", "wb") as file:
        pickle.dump([collections.OrderedDict(), 3], file)
    refused("list.pkl", "is neither safetensors nor")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    refused("pointer.pth", "is a Git LFS pointer")
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "script.pt")  # type: ignore[no-untyped-call]
    refused("script.pt", "is a TorchScript archive")


def test_label_space_of_ones_own(config: Config, weights: Tensors, tmp_path: Path) -> None:
    """Classes of a file's head by a list, in the list's order."""
    torch.save(weights, tmp_path / "own.pth")
    (tmp_path / "classes.txt").write_text("\n".join(reversed(SYNSETS)))
    init = Init(checkpoint=tmp_path / "own.pth", label_space=str(tmp_path / "classes.txt"))
    model = fresh(config)
    load_into(model, find_source(init), SYNSETS)
    assert torch.equal(model.state_dict()["head.weight"], weights["head.weight"].flip(0))
    known = find_source(init.model_copy(update={"label_space": "imagenet-1k"}))
    assert known.synsets == imagenet_1k_synsets()
    for typo, meant in (("imagenet1k", "imagenet-1k"), ("publihsed-22k", "published-22k"), ("null", None)):
        with pytest.raises(
            CheckpointError, match=rf"^init\.label_space: {typo} is no data set folder, no text"
        ) as caught:
            find_source(init.model_copy(update={"label_space": typo}))
        assert str(caught.value).endswith(f"did you mean {meant!r}?" if meant else "are words of their own)")


def test_the_check_opens_the_file(datasets: Datasets, config: Config, weights: Tensors, tmp_path: Path) -> None:
    torch.save({"model": spoilt(weights, torch.nan)}, tmp_path / "nan.pth")
    run = small_run(
        datasets, tmp_path, f"init.checkpoint={tmp_path}/nan.pth", "init.label_space=none", stage="finetune"
    )
    done = run_module("pipeline", *run, "data.resolution=64", "--check")
    assert done.returncode == 1
    assert re.fullmatch(r"error: \S+nan\.pth: norm\.weight has 2 of \d+ values .*\n", done.stderr), done.stderr
