"""Images a second of one GPU, as a range: from what a traced pass computes and moves, and what the GPU could give."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.planning.rates import Gpu, GpuRates
from pipeline.planning.trace import Traced

# Assumed: shares of the data sheet's rates that the slow and the fast end of the range reach. Products: cuBLAS on
# HorNet's narrow layers; memory: kernels that stream; depthwise: of the fp32 peak, bound by issue slots (RESULTS.md).
_PRODUCTS = (0.5, 0.75)
_MEMORY = (0.75, 0.9)
_DEPTHWISE = {False: (0.1, 0.4), True: (0.4, 0.6)}  # PyTorch's, our kernels
_FUSED = {False: (1.0, 0.9), True: (0.7, 0.45)}  # of the bytes that single operations move
_MEASURED_SPREAD = (0.97, 1.0)


@dataclass(frozen=True)
class Range:
    """The slow and the fast end."""

    low: float
    high: float

    def __mul__(self, factor: float) -> Range:
        return Range(self.low * factor, self.high * factor)

    def __truediv__(self, divisor: float) -> Range:
        return self * (1 / divisor)

    @property
    def inverse(self) -> Range:
        """1 / it: seconds of images a second, slowest first again."""
        return Range(1 / self.low, 1 / self.high)


def seconds_per_image(traced: Traced, gpu: Gpu, bf16: bool, fused: bool, rates: GpuRates | None) -> Range:
    """Of forward and backward on one GPU; `fused`: our kernels run, or torch.compile's. `low` is the slow end."""
    peak = gpu.peak_flops(bf16)
    measured = (rates.gemm_tflops if rates else {}).get("bf16" if bf16 else "tf32")
    ends = []
    for end in (0, 1):
        products = traced.dense_flops / (measured * 1e12 * (0.7, 0.95)[end] if measured else peak * _PRODUCTS[end])
        depthwise = traced.depthwise_flops / (gpu.fp32_flops * _DEPTHWISE[fused][end])
        moved = traced.moved * _FUSED[fused][end] / (gpu.memory_rate * _MEMORY[end])
        ends.append((products + depthwise + moved) / traced.batch)
    return Range(*ends)


def images_per_second(seconds: Range, known: float | None) -> Range:
    """Of one GPU that waits for nothing: as measured where that is `known`."""
    if known is not None:
        return Range(known * _MEASURED_SPREAD[0], known * _MEASURED_SPREAD[1])
    return seconds.inverse
