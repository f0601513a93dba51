"""How fast the operators are: depthwise 7x7 beside cuDNN's, and the other kernels at HorNet-L's shapes.

- depthwise: in bf16 at L's four stages, forward and both gradients: cuDNN in channels_last and NCHW (benchmark mode,
  contiguous inputs), and ours (a slice of a wider map, as in the model). FMA bound: that of fp32 multiply-adds.
- other_kernels: GB/s against a copy of the device, and against what runs without the kernel.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import kernels
from tests.gpu.kernels import (
    TOTALS,
    WIDTHS,
    Case,
    convolution_backward,
    depthwise_cases,
    gated_linear_cases,
    residual_cases,
    row_cases,
    size,
)
from tests.gpu.models import batch_at
from tests.gpu.timing import Bench

FMA_TFLOPS = {"H200": 66.9, "H100": 66.9, "A100": 19.5}  # fp32 outside tensor cores, data sheets


def depthwise(bench: Bench) -> bool:
    copy = bench.copy_bytes_s()
    columns = "px | map | pass | spelling | us | TFLOP/s | of FMA bound | GB/s | of copy"
    bench.heading(f"depthwise 7x7, bf16; copy {copy / 1e12:.2f} TB/s", columns)
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else ""
    bound = next((tflops for key, tflops in FMA_TFLOPS.items() if key in name), None)
    like = torch.empty(0, device=bench.device, dtype=torch.bfloat16)
    for px in bench.args.px:
        for stage, channels in enumerate((12, 24) if bench.tiny else TOTALS):
            side = (8 if bench.tiny else px // 4) >> stage
            batch = 1 if bench.tiny else batch_at(bench, px)
            cases = [("Triton", case) for case in depthwise_cases(batch, side, channels, like)]
            for spelling, case in (*stock_depthwise(batch, side, channels, like), *cases):
                what = case.name.removeprefix("depthwise").removeprefix("_") or "forward"
                fields = {"px": px, "map": f"{batch}x{side}x{side}x{channels}", "what": what, "spelling": spelling}
                if bench.late(f"{fields}"):
                    continue
                took = bench.attempt(case.run)
                if isinstance(took, str):
                    bench.row(**fields, us=took)
                    continue
                tflops, speed = case.flops / took / 1e12, case.bytes / took
                measured = {"us": took * 1e6, "tflops": tflops, "of_fma": bound and tflops / bound}
                bench.row(**fields, **measured, gb_s=speed / 1e9, of_copy=speed / copy)
    return True


def stock_depthwise(batch: int, side: int, channels: int, like: Tensor) -> Iterator[tuple[str, Case]]:
    """torch's convolution, forward and both gradients, in both layouts."""
    weight = torch.randn(channels, 1, 7, 7, device=like.device).to(like.dtype)
    bias = torch.randn(channels, device=like.device).to(like.dtype)
    for spelling, layout in (("cuDNN NHWC", torch.channels_last), ("cuDNN NCHW", torch.contiguous_format)):
        maps = (torch.randn(batch, channels, side, side, device=like.device).to(like.dtype) for _ in range(2))
        x, dy = (t.to(memory_format=layout) for t in maps)
        w = weight.to(memory_format=layout)
        flops, moved = 2 * 49 * x.numel(), size(x, dy)
        works: dict[str, Callable[[], object]] = {
            "forward": lambda x=x, w=w: F.conv2d(x, w, bias, padding=3, groups=channels),
            "backward_input": lambda x=x, w=w, dy=dy: convolution_backward(dy, x, w, [True, False, False]),
            "backward_weight": lambda x=x, w=w, dy=dy: convolution_backward(dy, x, w, [False, True, True]),
        }
        for what, work in works.items():
            yield spelling, Case(what, "", work, tuple, None, moved, flops)


def other_kernels(bench: Bench) -> bool:
    copy = bench.copy_bytes_s()
    columns = "kernel | shape | us | GB/s | of copy | without it, us | ratio"
    bench.heading(f"other kernels, bf16; copy {copy / 1e12:.2f} TB/s", columns)
    like = torch.empty(0, device=bench.device, dtype=torch.bfloat16)
    px = bench.args.px[0]
    batch = 1 if bench.tiny else batch_at(bench, px)
    for stage, channels in enumerate((12, 24) if bench.tiny else WIDTHS):
        side = (4 if bench.tiny else px // 4) >> stage
        rows = batch * side * side
        hidden = row_cases(rows, 4 * channels, like)
        cases = (
            *(case for case in row_cases(rows, channels, like) if "gelu" not in case.name),
            *(case for case in hidden if "gelu" in case.name),
            *residual_cases(batch, side * side, channels, like),
            *gated_linear_cases(rows, channels // 2, channels, like),
        )
        for case in cases:
            if bench.late(f"{case.name} {case.shape}"):
                continue
            fields = {"kernel": case.name, "shape": case.shape}
            took = bench.attempt(case.run)
            if isinstance(took, str):
                bench.row(**fields, us=took)
                continue
            without: float | str | None = None
            if case.plain is not None:
                with kernels.enabled(False):
                    without = bench.attempt(case.plain)
            speed = case.bytes / took
            ratio = without / took if isinstance(without, float) else None
            said = without * 1e6 if isinstance(without, float) else without
            measured = {"us": took * 1e6, "gb_s": speed / 1e9, "of_copy": speed / copy}
            bench.row(**fields, **measured, without_us=said, ratio=ratio)
    return True
