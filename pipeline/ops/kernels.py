"""Which spelling of an operator runs: Triton kernels on a GPU, plain PyTorch everywhere else.

`PIPELINE_KERNELS=0` in the environment turns the kernels off. Before a device's first use they are tried on it
against the plain spellings, on small inputs; where one fails to compile or disagrees, all stay off there and a
warning says why.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_on = os.environ.get("PIPELINE_KERNELS", "1") != "0"
_forced: bool | None = None


@contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Kernels on (where they can be) or off, inside the block."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


@contextmanager
def forced(on: bool) -> Iterator[None]:
    """Kernels on or off, inside the block, wherever the tensors are: for the check, and for Triton's interpreter."""
    global _forced
    before, _forced = _forced, on
    try:
        yield
    finally:
        _forced = before


def usable(x: Tensor) -> bool:
    """Whether the Triton kernels take `x`: on a GPU on which they work, and of 32 bits or fewer.

    Not while torch.compile traces: its own kernels fuse what surrounds them, which ours would keep apart.
    """
    if torch.compiler.is_compiling():
        return False
    if _forced is not None:
        return _forced and x.dtype in _DTYPES
    return _on and x.is_cuda and x.dtype in _DTYPES and why_not(x.device.index) is None


@cache
def why_not(device: int) -> str | None:
    """Why the kernels are off on this GPU, or None. Tries them, the first time; a second or two."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than sm_80"
    from pipeline.ops import selfcheck

    try:
        with torch.cuda.device(device):
            wrong = selfcheck.disagreement(torch.device("cuda", device))
    except Exception as error:  # a compiler's or a driver's error, of any kind: training goes on without kernels
        wrong = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if wrong is None:
        return None
    warnings.warn(
        f"cuda:{device}: Triton kernels are off, plain PyTorch runs in their place (slower): {wrong}", stacklevel=2
    )
    return wrong
