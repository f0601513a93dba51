"""Which class stands first where logits are equal, and that logits are those of a float32 head."""

from __future__ import annotations

import numpy as np
import timm
import torch
from torchmetrics.functional.classification import multiclass_accuracy

from pipeline.data.views import Batch
from pipeline.evaluation.accuracy import evaluate, logits_of
from pipeline.evaluation.scores import places, score, tied
from pipeline.models.hornet import HorNet


def test_of_equal_logits_the_lower_class_stands_first() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]] * 4)
    labels = torch.tensor([1, 2, 0, 3])
    assert places(logits, labels).tolist() == [0, 1, 2, 3]
    assert tied(logits).tolist() == [True] * 4
    found = score(logits, labels)
    assert found.top.tolist() == [[1, 2, 0, 3]] * 4
    assert (found.place == 0).tolist() == (logits.numpy().argmax(1) == labels.numpy()).tolist()
    assert not tied(torch.tensor([[1.0, 1.0, 2.0]]))


def test_what_is_no_number_is_no_hit() -> None:
    nan, inf = float("nan"), float("inf")
    assert places(torch.full((2, 3), nan), torch.tensor([0, 2])).tolist() == [3, 3]
    assert places(torch.tensor([[nan, 5.0, 1.0]]), torch.tensor([1])).tolist() == [1]
    assert places(torch.tensor([[2.0, -inf, -inf]]), torch.tensor([1])).tolist() == [3]  # the head lacks the class


def test_many_labels_an_image_count_for_the_best() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0], [2.0, 3.0, 4.0, 5.0]])
    found = score(logits, torch.tensor([[3, 1, -1], [0, -1, -1]]))
    assert (found.label.tolist(), found.place.tolist()) == ([1, 0], [1, 3])


def test_agrees_with_torchmetrics_where_nothing_is_tied() -> None:
    rng = np.random.default_rng(0)
    logits, labels = torch.from_numpy(rng.normal(size=(500, 30))).float(), torch.from_numpy(rng.integers(0, 30, 500))
    for k in (1, 5):
        ours = (places(logits, labels) < k).float().mean()
        assert ours == multiclass_accuracy(logits, labels, num_classes=30, top_k=k, average="micro")


def test_under_bf16_the_head_is_float32() -> None:
    """Logits that differ by less than bf16 can tell stay apart: in training's evaluation, and in a model by itself."""
    torch.manual_seed(0)
    model = timm.create_model("hornet_nano_gf", num_classes=1000).eval()
    assert isinstance(model, HorNet)
    torch.nn.init.normal_(model.head.weight, std=1e-5)
    torch.nn.init.constant_(model.head.bias, 8.0)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    batch = Batch(images, labels, labels, labels)
    device = torch.device("cpu")
    with torch.inference_mode():
        logits = logits_of(model, batch, device, bf16=True)
        with torch.autocast("cpu", torch.bfloat16):
            by_itself = model(images)
    assert by_itself.dtype == torch.float32
    assert torch.equal(logits, by_itself)
    assert tied(logits.bfloat16().float()).all()  # what a head under autocast would give
    assert not tied(logits).any()
    assert evaluate(model, [batch], device, bf16=True)["tied_top1"] == 0
