"""The block with Triton kernels in place: dispatch, values and gradients, and what happens where a kernel is wrong.

Without a GPU in Triton's interpreter; test_triton.py takes the kernels one by one.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.kernels import DEVICE, import_kernels
from tests.support.models import furthest, gradients, model_of
from tests.support.runs import ROOT

pytest.importorskip("triton", reason="triton is not installed")
import_kernels()
from pipeline.ops import kernels, selfcheck  # noqa: E402
from pipeline.ops.recompute_gating import gating  # noqa: E402
from pipeline.ops.triton import block as block_triton  # noqa: E402

pytestmark = pytest.mark.gpu


def test_a_model_with_kernels(monkeypatch: pytest.MonkeyPatch):
    """All of them at once, through every dispatch, with samples dropped; fp32 against plain autograd.

    The GF model has both kinds of block.
    """
    model = model_of(True, depths=(1, 1, 1, 1)).to(DEVICE)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of what it is compared with
    x = torch.randn(3, 3, 32, 32, device=DEVICE)
    with kernels.forced(False):
        plain = gradients(model, x, "none")
    for policy in ("none", "selective_mlp"):
        with kernels.forced(True):
            assert furthest(gradients(model, x, policy), plain) <= 1e-5, policy


def test_kernels_are_tried_before_they_are_used(monkeypatch: pytest.MonkeyPatch):
    """In whatever state the first pass is, under autocast or in an evaluation; and a wrong one is named."""
    for name, small in (("_SIDE", 4), ("_DIM", 12), ("_WIDE", 40)):
        monkeypatch.setattr(selfcheck, name, small)
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        real = selfcheck.disagreement
        monkeypatch.setattr(kernels, "_trial", lambda device: real(torch.device("cpu")))
    monkeypatch.setattr(kernels, "_verdicts", {})
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
        assert kernels.why_not(0) is None

    right = block_triton.gelu_backward
    monkeypatch.setattr(block_triton, "gelu_backward", lambda da, h: (1.5 * right(da, h)[0], right(da, h)[1]))
    monkeypatch.setattr(kernels, "_verdicts", {})
    with pytest.warns(UserWarning, match="Triton kernels are off.*GELU in torch.float32 is off by"):
        assert kernels.why_not(0)

    def broken(*_: object) -> None:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(block_triton, "layer_norm", broken)
    monkeypatch.setattr(kernels, "_verdicts", {})
    with pytest.warns(UserWarning, match="RuntimeError: no such instruction$"):
        kernels.why_not(0)


def test_where_they_are_used(monkeypatch: pytest.MonkeyPatch):
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=SimpleNamespace(index=0))
    monkeypatch.setattr(kernels, "_verdicts", {0: None})
    assert kernels.usable(on_gpu)
    assert not kernels.usable(torch.zeros(1))
    assert not kernels.usable(SimpleNamespace(**{**vars(on_gpu), "dtype": torch.float64}))
    with FakeTensorMode():
        assert not kernels.usable(on_gpu)
        with ThreadPoolExecutor(1) as other:  # a mode is its thread's own
            assert other.submit(kernels.usable, on_gpu).result()
    with kernels.enabled(False):
        assert not kernels.usable(on_gpu)
    environment = {**os.environ, "PIPELINE_KERNELS": "0"}
    program = "from pipeline.ops import kernels; print(kernels._off)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "PIPELINE_KERNELS is 0\n"


def test_gradients_do_not_depend_on_strides():
    """Of what comes in: a slice of planes seen as NHWC, say."""
    torch.manual_seed(0)
    shapes = [(12, 6), (12,), (6, 12), (6,)]
    tensors = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    gate, context = (torch.randn(2, c, 3, 3, device=DEVICE).permute(0, 2, 3, 1).requires_grad_() for c in (6, 18))
    results = []
    for on in (False, True):
        with kernels.forced(on):
            out = gating(gate, context, None, [(tensors[0], tensors[1])], (tensors[2], tensors[3]))
            results.append(torch.autograd.grad(out.square().sum(), [gate, context, *tensors]))
    assert furthest(list(results[1]), list(results[0])) <= 1e-5
