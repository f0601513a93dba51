"""Which spelling of an operator runs: Triton kernels on a GPU, plain PyTorch everywhere else.

`PIPELINE_KERNELS=0` in the environment turns the kernels off. Before a device's first use they are tried on it
against the plain spellings in float64, on small inputs (by `selfcheck.py`, which the models hand to `try_by`); where
one fails to compile or disagrees, all stay off there and a warning says why. The ranks of a run have to agree
(`turn_off`): which spelling runs decides in which order gradients are ready, and so what ranks add up together.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16)
_off = "PIPELINE_KERNELS is 0" if os.environ.get("PIPELINE_KERNELS", "1") == "0" else None  # why
_forced: bool | None = None
_trial: Callable[[torch.device], str | None] | None = None
_lock = threading.Lock()
_verdicts: dict[int, str | None] = {}


@contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Kernels on (where they can be) or off, inside the block."""
    global _off
    before, _off = _off, None if on else "they are turned off here"
    try:
        yield
    finally:
        _off = before


def try_by(trial: Callable[[torch.device], str | None]) -> None:
    """Set what tries the kernels on a device: returns what is wrong with them there, or None."""
    global _trial
    _trial = trial


def turn_off(why: str) -> None:
    """For good, on every device of this process."""
    global _off
    _off = why


@contextmanager
def forced(on: bool) -> Iterator[None]:
    """Kernels on or off, inside the block, wherever the tensors are: for the check, and for Triton's interpreter."""
    global _forced
    before, _forced = _forced, on
    try:
        yield
    finally:
        _forced = before


def exported() -> bool:
    """Whether the model is being written down by torch.export or torch.jit, for who has none of our operators."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def under_a_mode() -> bool:
    """Whether a dispatch mode of this thread sees every operation: fake tensors, a counter of FLOPs.

    Not `is_in_torch_dispatch_mode`, which speaks for all threads of the process (torch 2.15).
    """
    return torch._C._len_torch_dispatch_stack() > 0


def usable(x: Tensor) -> bool:
    """Whether the Triton kernels take `x`: float32 or bf16, on a GPU on which they work.

    Not while torch.compile traces: its own kernels fuse what surrounds them, which ours would keep apart; nor for
    export; nor under a dispatch mode, where tensors may be fakes, or products are counted.
    """
    if torch.compiler.is_compiling() or exported() or x.dtype not in _DTYPES:
        return False
    if _forced is not None:
        return _forced
    return _off is None and x.is_cuda and not under_a_mode() and why_not(x.device.index) is None


def why_not(device: int) -> str | None:
    """Why the kernels are off on this GPU, or None. Tries them, the first time: seconds, so a run asks at its start."""
    if _off is not None:
        return _off
    with _lock:
        if device not in _verdicts:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return "they cannot be tried while a CUDA graph is captured"  # no verdict for later
            # In a thread of its own: there is no autocast, no inference mode and no checkpoint's hook around it.
            try:
                with ThreadPoolExecutor(1) as pool:
                    _verdicts[device] = pool.submit(_try, device).result()
            except torch.OutOfMemoryError:
                return "the GPU was too full to try them"  # as it may not be next time
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
    if _trial is None:
        return "nothing has tried them: import pipeline.models"
    try:
        with torch.cuda.device(device):
            return _trial(torch.device("cuda", device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's or a driver's error, of any kind: training goes on without kernels
        return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
