"""The block with Triton kernels in place: dispatch, values and gradients, and what happens where a kernel is wrong.

Without a GPU in Triton's interpreter; tests/test_triton.py takes the kernels one by one.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytest.importorskip("triton", reason="triton is not installed")
from test_recompute import furthest, gradients, model_of
from test_triton import DEVICE  # first: it imports the kernels for the interpreter where there is no GPU

from pipeline.ops import block_triton, kernels, selfcheck


@pytest.mark.parametrize("gf", [False, True], ids=["7x7", "gf"])
def test_a_model_with_kernels(gf: bool):
    """All of them at once, through every dispatch, with samples dropped; fp32 against plain autograd."""
    model = model_of(gf, depths=(1, 1, 1, 1)).to(DEVICE)
    x = torch.randn(3, 3, 32, 32, device=DEVICE)
    with kernels.forced(False):
        plain = gradients(model, x, "none")
    for policy in ("none", "selective_mlp"):
        with kernels.forced(True):
            assert furthest(gradients(model, x, policy), plain) <= 1e-5, policy


def test_kernels_are_tried_before_they_are_used(monkeypatch: pytest.MonkeyPatch):
    for name, small in (("_BATCH", 3), ("_SIDE", 5), ("_DIM", 12)):
        monkeypatch.setattr(selfcheck, name, small)
    assert selfcheck.disagreement(torch.device(DEVICE)) is None
    right = block_triton.gelu_backward
    monkeypatch.setattr(block_triton, "gelu_backward", lambda da, h: (1.5 * right(da, h)[0], right(da, h)[1]))
    monkeypatch.setattr(selfcheck, "_TOLERANCE", {torch.float32: 1e-4})
    assert "GELU in torch.float32 is off by" in str(selfcheck.disagreement(torch.device(DEVICE)))


def test_the_environment_turns_them_off():
    """And without them, nothing of them is imported."""
    program = (
        "import sys, torch, pipeline.models; from pipeline.ops import kernels; "
        "print(kernels.usable(torch.zeros(1)), kernels._on, 'pipeline.ops.block_triton' in sys.modules)"
    )
    environment = {**os.environ, "PIPELINE_KERNELS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False", "False"]
