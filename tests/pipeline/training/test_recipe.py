"""The recipe: groups, schedule, mixing and EMA against their definitions."""

import math

import numpy as np
import pytest
import timm
import torch

from pipeline.config.load import load
from pipeline.config.sections import MODELS, ConfigError
from pipeline.models.build import build_model
from pipeline.training.recipe import AdamWithEma, mixing_and_loss, parameter_groups, schedule

DEMO = "configs/demo_pretrain.yaml"
FINETUNE = "configs/finetune_hornet_l_in1k_384.yaml"


def test_groups_cover_every_parameter_once() -> None:
    for path in (DEMO, FINETUNE):
        config = load(path)
        with torch.device("meta"):
            model = build_model(config.model, 10, config.data.resolution)
        groups = parameter_groups(model, config.optimizer)
        grouped = [id(p) for group in groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        for name, parameter in model.named_parameters():
            assert (id(parameter) in decayed) == (parameter.ndim > 1), name
    scales = {round(group["lr_scale"], 12) for group in groups}
    assert scales == {round(0.7**depth, 12) for depth in range(14)}


def test_schedule_is_the_published_one() -> None:
    """Linear from 0 over the warm-up, then half a cosine to lr_final over the rest; times lr_scale; no memory."""
    config = load(DEMO, ["optimizer.warmup_epochs=2", "optimizer.lr_peak=4e-3", "optimizer.lr_final=1e-6"]).optimizer
    weight = torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [weight], "lr_scale": 0.5}]
    adamw = torch.optim.AdamW(groups, lr=config.lr_peak)
    rates = schedule(adamw, config, steps_per_epoch=10, steps=100)
    for step in (0, 7, 19, 20, 60, 99, 7):
        rates.step_update(step)
        if step < 20:
            expected = 4e-3 * step / 20
        else:
            expected = 1e-6 + (4e-3 - 1e-6) * (1 + math.cos(math.pi * (step - 20) / 80)) / 2
        assert adamw.param_groups[0]["lr"] == pytest.approx(0.5 * expected, rel=1e-9, abs=1e-12)


def test_mixing_depends_on_its_key_alone() -> None:
    mix, loss = mixing_and_loss(load(DEMO).augment, 50)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)

    def mixed(key: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        np.random.rand(5)  # whatever others draw in between
        return mix(images.clone(), labels, key)

    (a, targets), (b, _), (c, _) = mixed((0, 3, 0)), mixed((0, 3, 0)), mixed((0, 3, 8))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert targets.shape == (8, 50)
    assert torch.allclose(targets.sum(1), torch.ones(8))
    assert loss(torch.zeros(8, 50), targets).item() == pytest.approx(math.log(50), rel=1e-5)


def test_without_mixing_labels_are_smoothed() -> None:
    mix, loss = mixing_and_loss(load(FINETUNE).augment, 10)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    assert mix(images, labels, (0,))[1] is labels
    logits = torch.randn(4, 10)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_ema_is_the_average_of_the_weights() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5))
    optimizer = AdamWithEma([weight], ema_decay=0.9, lr=0.1)
    optimizer.init_state(weight)
    average = weight.detach().clone()
    for _ in range(4):
        weight.grad = torch.randn(5)
        optimizer.step()
        average = 0.9 * average + 0.1 * weight.detach()
    torch.testing.assert_close(optimizer.state[weight]["ema"], average)
    assert optimizer.state_names == ("exp_avg", "exp_avg_sq", "ema")


def test_unknown_model() -> None:
    """The configuration knows what timm does, without timm."""
    with pytest.raises(ConfigError, match="did you mean 'hornet_large_gf'"):
        load(DEMO, ["model.name=hornet_larg_gf"])
    assert sorted(MODELS) == timm.list_models("hornet_*")
