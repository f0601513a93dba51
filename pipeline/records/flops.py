"""What a model computes and what a device could: the two numbers behind the MFU (model FLOPs utilisation) of a run.

Source of the measure: PaLM, Chowdhery et al. 2022, appendix B. Only what the model needs is counted: work that
activation checkpointing repeats is not, so a run that recomputes less has the higher MFU.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.sections import Model
from pipeline.models.build import build_model

FLOPS_PER_MAC = 2
PASSES = 3  # forward, the gradient of the activations, the gradient of the weights

# Words of `torch.cuda.get_device_name` that must all be there, then TFLOP/s: bf16, TF32, fp32. The first row that fits
# counts. Dense: data sheets of newer devices give twice as much, "with sparsity", which a training run has not.
# Source: NVIDIA's data sheets of each product (HGX B200, GB200, H200, H100, A100, L40S, L4, A10, V100).
_PEAKS: tuple[tuple[frozenset[str], tuple[float, float, float]], ...] = tuple(
    (frozenset(words.split()), tflops)
    for words, tflops in (
        ("GB200", (2500.0, 1250.0, 80.0)),
        ("B200", (2250.0, 1125.0, 75.0)),
        ("H200 NVL", (835.5, 417.5, 60.0)),
        ("H200", (989.4, 494.7, 66.9)),
        ("GH200", (989.4, 494.7, 66.9)),
        ("H100 NVL", (835.5, 417.5, 60.0)),
        ("H100 PCIe", (756.5, 378.0, 51.2)),
        ("H100 HBM3", (989.4, 494.7, 66.9)),  # SXM: "NVIDIA H100 80GB HBM3"
        ("A100", (312.0, 156.0, 19.5)),
        ("L40S", (362.0, 183.0, 91.6)),
        ("L4", (121.0, 60.0, 30.3)),
        ("A10", (125.0, 62.5, 31.2)),
        ("V100 SXM2", (15.7, 15.7, 15.7)),  # its tensor cores know fp16 alone
        ("V100 PCIE", (14.0, 14.0, 14.0)),
    )
)
_GEMM_SIDE = 8192  # large enough to fill any device; 10^12 operations, at most a second on a slow one
_GEMM_REPEATS = 5


@lru_cache
def macs_per_image(model: Model, num_classes: int, resolution: int) -> float:
    """Multiply-accumulates of one forward pass of one square image of `resolution` pixels.

    Counted on the meta device: convolutions and matrix products, as in the published numbers (34.8 G for HorNet-L 7x7
    at 224). The counter has no entry for the FFT and the product with its filter: 0, up to 0.5 % of a GF model.
    """
    with torch.device("meta"):
        net = build_model(model, num_classes, resolution).eval()
        image = torch.empty(1, 3, resolution, resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    return counter.get_total_flops() / FLOPS_PER_MAC


def training_flops_per_image(model: Model, num_classes: int, resolution: int) -> float:
    """FLOPs that one image of a training step needs: forward and backward, nothing recomputed."""
    return PASSES * FLOPS_PER_MAC * macs_per_image(model, num_classes, resolution)


def peak_flops(device: torch.device, bf16: bool) -> float | None:
    """FLOP/s of one device in bf16 or in fp32 (TF32 where torch may use it for matrix products); None on a CPU.

    From the table, else measured by a matrix product, which comes out lower than a data sheet (70 to 90 % of it).
    """
    if device.type != "cuda":
        return None
    listed = listed_peak(torch.cuda.get_device_name(device), bf16)
    return listed if listed is not None else measured_peak(device, bf16)


def listed_peak(name: str, bf16: bool) -> float | None:
    """FLOP/s of the device that the driver calls `name`; None where the table lacks it, or it is a MIG slice."""
    return _listed(name, 0 if bf16 else 2 if torch.get_float32_matmul_precision() == "highest" else 1)


def listed_fp32_peak(name: str) -> float | None:
    """FLOP/s of its units for plain fp32, which no tensor core does; None as above."""
    return _listed(name, 2)


def _listed(name: str, column: int) -> float | None:
    words = set(re.split(r"[\s_-]+", name))
    if "MIG" in words:
        return None
    return next((tflops[column] * 1e12 for needed, tflops in _PEAKS if needed <= words), None)


def measured_peak(device: torch.device, bf16: bool, side: int = _GEMM_SIDE) -> float:
    """FLOP/s of the fastest of a few products of square matrices of `side`, in bf16 or fp32."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    # Not torch.randn: it would move the device's random state. Not zeros either: they cost a GPU less power.
    left = torch.linspace(-1, 1, side * side, device=device).view(side, side).to(dtype)
    right = left.flip(0, 1).contiguous()
    best = float("inf")
    for _ in range(_GEMM_REPEATS):
        _finish(device)
        started = time.perf_counter()
        torch.mm(left, right)
        _finish(device)
        best = min(best, time.perf_counter() - started)
    return FLOPS_PER_MAC * side**3 / best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
