"""Whether the kernels are right: each against float64, and a slice of HorNet-L with them and without. No program.

Run by bench_gpu.py.
"""

import contextlib
import math
from collections.abc import Iterator

import gpu_kernels
import torch
from gpu_models import POLICIES, autocast, hornet, set_policy
from gpu_timing import Bench
from torch import Tensor, nn

from pipeline.ops import kernels

# Relative L2 error against float64 that rounding explains, by dtype of the result; sums of 16-bit inputs are in fp32.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-3}
INTERPRETER = 2.5  # times that: it cuts bf16 off and does not round


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """No TF32: cuDNN's convolutions use it unless told."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def error(got: Tensor, truth: Tensor) -> float:
    """Relative L2 error; inf where a value is not finite or the shape is another."""
    if got.shape != truth.shape or not got.isfinite().all():
        return math.inf
    return ((got.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def check_kernels(bench: Bench) -> bool:
    """Whether all agree with float64 to rounding; one that is missing is named, and does not make it wrong."""
    bench.heading("correct: kernels", "kernel | shape | dtype | error of each result | verdict")
    right = True
    missing = [name for name in gpu_kernels.MODULES if gpu_kernels.kernel(name) is None]
    if missing:
        bench.note(f"not there: {', '.join(missing)}")
    for dtype in (torch.bfloat16, torch.float32):
        for case in gpu_kernels.small_cases(torch.empty(0, device=bench.device, dtype=dtype), bench.tiny):
            fields = {"kernel": case.name, "shape": case.shape, "dtype": str(dtype).removeprefix("torch.")}
            if bench.late(f"{fields}", share=0.6):
                continue
            try:
                got = case.run()
                got = (got,) if isinstance(got, Tensor) else got
                pairs = [(a, b) for a, b in zip(got, case.truth(), strict=True) if a is not None or b is not None]
                errors = [error(a, b) for a, b in pairs]
                factor = INTERPRETER if bench.tiny else 1
                fine = all(e <= factor * TOLERANCE[a.dtype] for e, (a, _) in zip(errors, pairs, strict=True))
                said = ", ".join(f"{e:.1e}" for e in errors)
            except Exception as failure:  # of Triton's compiler or the driver: the other kernels are still of interest
                fine, said = False, f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
            right &= fine
            bench.row(**fields, errors=said, verdict="ok" if fine else "WRONG")
    return right


def gradients(model: nn.Module, x: Tensor, probe: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The logits, and the gradient of every parameter."""
    model.train().zero_grad(set_to_none=True)
    with autocast(x.device, dtype):
        logits = model(x)
    (logits.double() * probe).sum().backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def check_model(bench: Bench) -> bool:
    """Whether the error against float64 is at most twice what it is without kernels, in the same dtype."""
    columns = "model | dtype | policy | logits, plain | kernels | worst gradient, plain | kernels | verdict"
    bench.heading("correct: a slice of HorNet-L against float64", columns)
    first, px = (16, 64) if bench.tiny else (192, 224)
    right = True
    if not bench.tiny and (why := kernels.why_not(0)) is not None:
        bench.note(f"WRONG: the model does not use its kernels: {why}")
        right = False
    for kind in bench.args.models:
        torch.manual_seed(0)
        # Layer scale large enough that blocks matter.
        truth_model = hornet(kind, first, (1, 1, 2, 1), px, 0.0, layer_scale_init=0.5).to(bench.device)
        model = hornet(kind, first, (1, 1, 2, 1), px, 0.0).to(bench.device)
        model.load_state_dict(truth_model.state_dict())
        x = torch.randn(2, 3, px, px, device=bench.device)
        probe = torch.randn(2, 1000, device=bench.device, dtype=torch.float64)
        truth = gradients(truth_model.double(), x.double(), probe, None)
        for dtype in (None, torch.bfloat16):
            for policy in POLICIES:
                fields = {"model": kind, "dtype": "bf16" if dtype else "fp32", "policy": policy}
                if bench.late(f"{fields}"):
                    continue
                if not set_policy(model, policy):
                    continue
                logits, worst = [], []
                for on in (False, True):
                    with kernels.enabled(on):
                        got = gradients(model, x, probe, dtype)
                    errors = {name: error(got[name], truth[name]) for name in truth}
                    logits.append(errors.pop("logits"))
                    worst.append(max(errors.values()))
                fine = all(with_kernels <= 2 * plain + 1e-6 for plain, with_kernels in (logits, worst))
                right &= fine
                measured = {"logits_plain": logits[0], "logits": logits[1], "worst_plain": worst[0], "worst": worst[1]}
                bench.row(**fields, **measured, verdict="ok" if fine else "WRONG")
    return right
