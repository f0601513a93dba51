"""Which spelling of an operator runs: Triton kernels on a GPU, plain PyTorch everywhere else.

`PIPELINE_KERNELS=0` in the environment turns the kernels off. Before a device's first use they are tried on it
against the plain spellings in float64, on small inputs; where one fails to compile or disagrees, all stay off there
and a warning says why.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_DTYPES = (torch.float32, torch.bfloat16)
_on = os.environ.get("PIPELINE_KERNELS", "1") != "0"
_forced: bool | None = None
_lock = threading.Lock()
_verdicts: dict[int, str | None] = {}


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
    """Whether the Triton kernels take `x`: float32 or bf16, on a GPU on which they work.

    Not while torch.compile traces: its own kernels fuse what surrounds them, which ours would keep apart. Nor under a
    dispatch mode, where tensors may be fakes, or products are counted.
    """
    if torch.compiler.is_compiling() or x.dtype not in _DTYPES:
        return False
    if _forced is not None:
        return _forced
    return _on and x.is_cuda and not is_in_torch_dispatch_mode() and why_not(x.device.index) is None


def why_not(device: int) -> str | None:
    """Why the kernels are off on this GPU, or None. Tries them, the first time: seconds, so a run asks at its start."""
    if not _on:
        return "PIPELINE_KERNELS is 0"
    with _lock:
        if device not in _verdicts:
            # In a thread of its own: there is no autocast, no inference mode and no checkpoint's hook around it.
            with ThreadPoolExecutor(1) as pool:
                _verdicts[device] = pool.submit(_try, device).result()
            if _verdicts[device] is not None:
                warnings.warn(
                    f"cuda:{device}: Triton kernels are off, plain PyTorch runs in their place (slower): "
                    f"{_verdicts[device]}",
                    stacklevel=2,
                )
    return _verdicts[device]


def _try(device: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than sm_80"
    try:
        from pipeline.ops import selfcheck

        with torch.cuda.device(device):
            return selfcheck.disagreement(torch.device("cuda", device))
    except Exception as error:  # a compiler's or a driver's error, of any kind: training goes on without kernels
        return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
