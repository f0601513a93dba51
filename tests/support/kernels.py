"""The Triton kernels on any machine: in the interpreter without a GPU, compiled on one."""

from __future__ import annotations

import os

import torch

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"


def import_kernels() -> None:
    """Import our kernels, decorated for the interpreter where there is no GPU.

    The variable is read when a kernel is decorated, so it does not stay for other tests and their processes. Triton's
    own `tl.sum` and `tl.zeros` were decorated when something imported triton first, without it.
    """
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1" if INTERPRETED else "0"
    try:
        from pipeline.ops.triton import block, depthwise, gnconv  # noqa: F401
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    for name in ("sum", "zeros"):
        if INTERPRETED and isinstance(getattr(tl, name), triton.JITFunction):
            setattr(tl, name, InterpretedFunction(getattr(tl, name).fn))
