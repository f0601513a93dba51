"""Whether the published model's reference numbers (tests/golden) come out on the device, in each precision.

Bounds: float64 as tests/pipeline/models/test_hornet.py has them; fp32 that of a kernel, 2e-5, on top; bf16 three times
what a CPU's rounding gives HorNet-T (tests/bench/RESULTS.md, "Rounding"): 5.6e-3 of the logits, 4.3e-2 of a gradient.
"""

from pathlib import Path

import numpy as np
import timm
import torch

from pipeline.ops import kernels
from tests.gpu.checks import TOLERANCE, exact_fp32
from tests.gpu.models import autocast
from tests.gpu.timing import Bench
from tests.support.models import GOLDEN, drawn_state

BF16_LOGITS, BF16_GRADIENT = 1.7e-2, 0.13
PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}  # of the weights


@exact_fp32()
def check_golden(bench: Bench) -> bool:
    columns = "file | precision | spelling | logits | maps | input gradient | worst gradient | bounds | verdict"
    bench.heading("reference numbers of the published model", columns)
    right = True
    files = sorted(GOLDEN.glob("*.npz"))
    for path in files[:1] if bench.tiny else files:
        for precision in PRECISIONS:
            for on in (False, True) if precision != "fp64" and not bench.tiny else (False,):
                fields = {"file": path.stem, "precision": precision, "spelling": "kernels" if on else "plain"}
                if bench.late(f"{fields}"):
                    continue
                with kernels.enabled(on):
                    logits, maps, image, worst = errors(bench, path, precision)
                forward, backward = bounds(path, precision)
                well = max(logits, maps) <= forward and max(image, worst) <= backward
                right &= well
                measured = {"logits": logits, "maps": maps, "input_gradient": image, "worst_gradient": worst}
                bench.row(
                    **fields, **measured, bounds=f"{forward:.0e}, {backward:.0e}", verdict="ok" if well else "WRONG"
                )
    return right


def bounds(path: Path, precision: str) -> tuple[float, float]:
    """Of what forward gives, and of gradients. The published GF model has its FFT in float32 even in a float64 one."""
    exact = 1e-5 if "_gf_" in path.stem else 1e-9
    if precision == "bf16":
        return BF16_LOGITS, BF16_GRADIENT
    more = TOLERANCE[torch.float32] if precision == "fp32" else 0.0
    return exact + more, exact + more


def errors(bench: Bench, path: Path, precision: str) -> tuple[float, float, float, float]:
    """Relative errors: of the logits (L2), the largest of a map's RMS, of the norm of the image's gradient, and the
    largest of the norm of a parameter's.
    """
    golden = np.load(path)
    model = timm.create_model(path.stem.rpartition("_")[0])
    model.load_state_dict(drawn_state(model), strict=True)
    dtype = PRECISIONS[precision]
    model = model.to(bench.device, dtype).eval()
    height, width = golden["hw"]
    images = np.random.default_rng(20220729).standard_normal((2, 3, height, width)).astype(np.float32)
    x = torch.from_numpy(images).to(bench.device, dtype).requires_grad_()
    with autocast(bench.device, torch.bfloat16 if precision == "bf16" else None):
        last, maps = model.forward_intermediates(x)
        logits = model.forward_head(last)
    probe = np.random.default_rng(20220730).standard_normal(logits.shape)
    (logits.double() * torch.from_numpy(probe).to(bench.device)).sum().backward()

    found = logits.detach().double().cpu().numpy()
    rms = [stage.detach().double().square().mean().sqrt().item() for stage in maps]
    assert x.grad is not None
    norms = {name: p.grad.double().norm().item() for name, p in model.named_parameters()}
    return (
        float(np.linalg.norm(found - golden["logits"]) / np.linalg.norm(golden["logits"])),
        max(relative(got, golden[f"stage{i}_rms"]) for i, got in enumerate(rms)),
        relative(x.grad.double().norm().item(), golden["input_grad_norm"]),
        max(relative(norms[n], g) for n, g in zip(golden["param_names"], golden["param_grad_norms"], strict=True)),
    )


def relative(got: float, expected: float) -> float:
    return abs(got - float(expected)) / abs(float(expected))
