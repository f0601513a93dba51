"""Whether all agrees with float64: each kernel, and a slice of HorNet-L with kernels, without, and compiled."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.models.hornet import HorNet
from pipeline.ops import kernels
from tests.gpu.kernels import MODULES, kernel, small_cases
from tests.gpu.models import POLICIES, autocast, compile_blocks, hornet, set_policy
from tests.gpu.timing import Bench

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


@exact_fp32()
def check_kernels(bench: Bench) -> bool:
    """Whether all agree with float64 to rounding; one that is missing is named, and does not make it wrong."""
    bench.heading("kernels against float64", "kernel | shape | dtype | error of each result | verdict")
    right = True
    missing = [name for name in MODULES if kernel(name) is None]
    if missing:
        bench.note(f"not there: {', '.join(missing)}")
    for dtype in (torch.bfloat16, torch.float32):
        for case in small_cases(torch.empty(0, device=bench.device, dtype=dtype), bench.tiny):
            fields = {"kernel": case.name, "shape": case.shape, "dtype": str(dtype).removeprefix("torch.")}
            if bench.late(f"{fields}"):
                continue
            try:
                got = case.run()
                got = (got,) if isinstance(got, Tensor) else got
                pairs = [(a, b) for a, b in zip(got, case.truth(), strict=True) if a is not None or b is not None]
                errors = [error(a, b) for a, b in pairs]
                factor = INTERPRETER if bench.tiny else 1
                well = all(e <= factor * TOLERANCE[a.dtype] for e, (a, _) in zip(errors, pairs, strict=True))
                said = ", ".join(f"{e:.1e}" for e in errors)
            except Exception as failure:  # of Triton's compiler or the driver: the other kernels are still of interest
                well, said = False, f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
            right &= well
            bench.row(**fields, errors=said, verdict="ok" if well else "WRONG")
    return right


def gradients(model: nn.Module, x: Tensor, probe: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The logits, and the gradient of every parameter."""
    model.train().zero_grad(set_to_none=True)
    with autocast(x.device, dtype):
        logits = model(x)
    (logits.double() * probe).sum().backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def slice_of_l(bench: Bench, kind: str) -> tuple[HorNet, Tensor, Tensor, dict[str, Tensor]]:
    """A block or two of each stage, images, a probe, and what float64 says of them."""
    first, px = (16, 64) if bench.tiny else (192, 224)
    torch.manual_seed(0)
    # Layer scale large enough that blocks matter.
    truth_model = hornet(kind, first, (1, 1, 2, 1), px, 0.0, layer_scale_init=0.5).to(bench.device)
    model = hornet(kind, first, (1, 1, 2, 1), px, 0.0).to(bench.device)
    model.load_state_dict(truth_model.state_dict())
    x = torch.randn(2, 3, px, px, device=bench.device)
    probe = torch.randn(2, 1000, device=bench.device, dtype=torch.float64)
    return model, x, probe, gradients(truth_model.double(), x.double(), probe, None)


def errors_of(model: nn.Module, x: Tensor, probe: Tensor, truth: dict[str, Tensor], bf16: bool) -> tuple[float, float]:
    """Of the logits, and the largest of a gradient."""
    got = gradients(model, x, probe, torch.bfloat16 if bf16 else None)
    errors = {name: error(got[name], truth[name]) for name in truth}
    return errors.pop("logits"), max(errors.values())


def fine(plain: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether the errors against float64 are at most twice those of plain PyTorch in the same dtype."""
    return all(theirs <= 2 * ours + 1e-6 for ours, theirs in zip(plain, other, strict=True))


@exact_fp32()
def check_model(bench: Bench) -> bool:
    """A slice with the kernels, by memory policy."""
    columns = "model | dtype | policy | logits, plain | kernels | worst gradient, plain | kernels | verdict"
    bench.heading("a slice of HorNet-L against float64", columns)
    right = True
    if not bench.tiny and (why := kernels.why_not(0)) is not None:
        bench.note(f"WRONG: the model does not use its kernels: {why}")
        right = False
    for kind in bench.args.models:
        model, x, probe, truth = slice_of_l(bench, kind)
        for bf16 in (False, True):
            for policy in POLICIES:
                fields = {"model": kind, "dtype": "bf16" if bf16 else "fp32", "policy": policy}
                if bench.late(f"{fields}") or not set_policy(model, policy):
                    continue
                errors = []
                for on in (False, True):
                    with kernels.enabled(on):
                        errors.append(errors_of(model, x, probe, truth, bf16))
                right &= (well := fine(*errors))
                (logits_plain, worst_plain), (logits, worst) = errors
                measured = {"logits_plain": logits_plain, "logits": logits, "worst_plain": worst_plain, "worst": worst}
                bench.row(**fields, **measured, verdict="ok" if well else "WRONG")
    return right


@exact_fp32()
def check_compiled(bench: Bench) -> bool:
    """The same with its blocks compiled, against eager without kernels. What trains comes first: it takes a while."""
    columns = "model | dtype | policy | logits, eager | compiled | worst gradient, eager | compiled | verdict"
    bench.heading("compiled blocks of a slice of HorNet-L against float64", columns)
    right = True
    subjects = ((True, "selective"), (False, "selective"), (True, "none"), (True, "block"))
    for bf16, policy in subjects[:1] if bench.tiny else subjects:
        for kind in bench.args.models:
            fields = {"model": kind, "dtype": "bf16" if bf16 else "fp32", "policy": policy}
            if bench.late(f"{fields}"):
                continue
            model, x, probe, truth = slice_of_l(bench, kind)
            set_policy(model, policy)
            with kernels.enabled(False):
                eager = errors_of(model, x, probe, truth, bf16)
            torch._dynamo.reset()
            compile_blocks(model, bench.tiny)
            try:
                found = errors_of(model, x, probe, truth, bf16)
            except Exception as failure:  # of the compiler: the other policies are still of interest
                bench.row(**fields, logits_eager=f"{type(failure).__name__}", verdict="WRONG")
                bench.note(f"failed: {str(failure)[:500]}")
                right = False
                continue
            right &= (well := fine(eager, found))
            measured = {"logits_eager": eager[0], "logits": found[0], "worst_eager": eager[1], "worst": found[1]}
            bench.row(**fields, **measured, verdict="ok" if well else "WRONG")
    return right
