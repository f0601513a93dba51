"""Compile every Triton kernel ahead of time, as training HorNet-L launches it, and look at the machine code.

    python tests/support/programs/compile_kernels.py [--quick] [--arch 80 90] [--dtype float32 bfloat16] [--only NAME]

Needs triton (with the ptxas and cuobjdump it brings), no GPU. The public functions are called on meta tensors, and what
they would launch is compiled instead; without --quick, of more shapes, and what the functions offer but training
leaves out ("variant": scales and layer scale, which the model folds into weights, results written into slices). A
line a kernel: registers a thread, stack bytes and accesses to local memory
(spills), shared memory, instructions in all, and for its hottest loop how many instructions it has and which part
of them are fp32 multiply-adds. Exit 1 if a kernel does not compile, if it spills, or if a 7x7 has too few of them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.ops.triton import block as block_triton
from pipeline.ops.triton import depthwise as depthwise_triton
from pipeline.ops.triton import gnconv as gnconv_triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TYPES |= {torch.int32: "*i32", torch.int64: "*i64"}
SPILLS = 0.01  # of a kernel's instructions: more than that in local memory is a spill that costs time
LEAST = 0.7  # multiply-adds in the loop of a 7x7, which nothing but instruction slots bounds
# A predicate, the opcode, its modifiers, and the target of a branch.
LINE = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([.\w]*)(?:.*`\((\.L\w+)\))?")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One launch that a function asked for: the jitted kernel, its arguments by name, the compiler's options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        """Specialised as Triton does at run time: whole multiples of 16 are known to be such, and pointers aligned."""
        constants = {p.name: self.arguments[p.name] for p in self.kernel.params if p.is_constexpr}
        unspecialised = {p.name for p in self.kernel.params if p.do_not_specialize}
        signature, attributes = {}, {}
        for i, (name, value) in enumerate(self.arguments.items()):
            if name in constants:
                signature[name] = "constexpr"
                continue
            signature[name] = TYPES[value.dtype] if isinstance(value, Tensor) else type_of(value)
            known = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
            if known and name not in unspecialised:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature=signature, constexprs=constants, attrs=attributes)


def type_of(value: float) -> str:
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"


def launches(call: Callable[[], Any]) -> list[Launch]:
    """What `call` launches, without launching it."""
    seen: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
        seen.append(Launch(self, {**dict(zip(self.arg_names, args, strict=False)), **kwargs}, options))

    run = triton.JITFunction.run
    triton.JITFunction.run = record
    try:
        call()
    finally:
        triton.JITFunction.run = run
    return seen


def cases(dtype: torch.dtype, quick: bool) -> dict[str, Callable[[], Any]]:
    """HorNet-L on 384 pixels, 32 images: its third stage (24 x 24, 768 channels of 4), others where tiles differ."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    def half(*shape: int) -> Tensor:  # a slice of a tensor twice as wide
        return empty(*shape[:-1], 2 * shape[-1])[..., shape[-1] :]

    def affine(c: int) -> tuple[Tensor, Tensor]:
        return empty(c, of=torch.float32), empty(c, of=torch.float32)

    def norm(c: int) -> dict[str, Callable[[], Any]]:
        n = 32 * 24 * 24
        x, stats = empty(n, c), (empty(n, of=torch.float32), empty(n, of=torch.float32))
        return {
            f"layer_norm {c}": lambda: block_triton.layer_norm(x, *affine(c), 1e-6),
            f"layer_norm_apply {c}": lambda: block_triton.layer_norm_apply(x, *stats, *affine(c)),
            f"layer_norm_backward {c}": lambda: block_triton.layer_norm_backward(x, x, *stats, affine(c)[0], x),
        }

    def convolution(size: int, c: int, k: int) -> dict[str, Callable[[], Any]]:
        dy, weight = empty(32, size, size, c), empty(c, 1, k, k, of=torch.float32)
        # The 3x3 is the global-local filter's: half of the channels, no bias.
        x, bias = (half(32, size, size, c), None) if k == 3 else (dy, empty(c, of=torch.float32))
        name = f"{k}x{k} {size}x{size}x{c}"
        return {
            f"depthwise {name}": lambda: depthwise_triton.depthwise(x, weight, bias, 1.0),
            f"depthwise_backward_input {name}": lambda: depthwise_triton.depthwise_backward_input(
                dy, weight, 1.0, None
            ),
            f"depthwise_backward_weight {name}": lambda: depthwise_triton.depthwise_backward_weight(dy, x, k, 1.0),
        }

    def gating(d: int) -> dict[str, Callable[[], Any]]:
        n = 32 * 24 * 24
        a, b = empty(n, d), half(n, d)  # of the projections, of the depthwise output
        return {
            f"multiply {d}": lambda: gnconv_triton.multiply(a, b),
            f"multiply_backward {d}": lambda: gnconv_triton.multiply_backward(a, a, b, a, b),
        }

    def variants() -> dict[str, Callable[[], Any]]:
        """What the functions offer and training does not use."""
        maps, weight, bias = half(32, 24, 24, 1440), empty(1440, 1, 7, 7, of=torch.float32), affine(1440)[0]
        small = empty(32, of=torch.int32)
        found = {
            "depthwise": lambda: depthwise_triton.depthwise(maps, weight, bias, 1 / 3),
            "depthwise_backward_input": lambda: depthwise_triton.depthwise_backward_input(maps, weight, 1 / 3, maps),
            "depthwise_backward_weight": lambda: depthwise_triton.depthwise_backward_weight(maps, maps, 7, 1 / 3),
            "residual": lambda: block_triton.residual(x, x, small, affine(768)[0], 1.25),
            "layer_norm": lambda: block_triton.layer_norm(h, None, None, 1e-6),
        }
        return {f"variant: {name}": call for name, call in found.items()}

    def linear(k: int, d: int) -> dict[str, Callable[[], Any]]:
        n = 32 * 24 * 24
        weight, bias = empty(d, k), empty(d)
        return {f"gated_linear {k}->{d}": lambda: gnconv_triton.gated_linear(empty(n, k), weight, bias, half(n, d))}

    h, x = empty(32 * 24 * 24, 3072), empty(32, 24 * 24, 768)
    position = empty(32, of=torch.int64)
    found = {
        **convolution(24, 1440, 7),
        **norm(768),
        **gating(768),
        **linear(96, 192),
        "gelu": lambda: block_triton.gelu(h),
        "gelu_backward": lambda: block_triton.gelu_backward(h, h),
        "residual": lambda: block_triton.residual(x, x, position, None, 1.0),
    }
    if quick:
        return found
    # 224 pixels: maps of 14 and 7. Other widths of a strip; the filter's 3x3; widths that are no power of two.
    more = convolution(14, 1440, 7) | convolution(7, 2976, 7) | convolution(32, 128, 7) | convolution(24, 720, 3)
    more |= norm(192) | norm(1536) | norm(2976) | gating(96) | gating(1536) | linear(48, 96)
    more["residual of all samples"] = lambda: block_triton.residual(x, x, None, None, 1.0)
    return found | more | variants()


def compile_one(launch: Launch, arch: int) -> tuple[str, bool]:
    """(a line of figures, whether it is as it should be)."""
    began = time.perf_counter()
    compiled = triton.compile(launch.source(), target=GPUTarget("cuda", arch, 32), options=launch.options)
    took = time.perf_counter() - began
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "--print-code", file.name)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    instructions, loop = machine_code(code)
    kinds = Counter(instructions)
    local = kinds["LDL"] + kinds["STL"]
    share = Counter(loop)["FFMA"] / len(loop) if loop else 0.0
    vectors = max((int(bits) for bits in re.findall(r"LDG\.E[.\w]*?\.(64|128)\b", code)), default=32)
    line = (
        f"{registers:4d} regs {stack:4d} stack {local:3d} local {compiled.metadata.shared:6d} shared "
        f"{len(instructions):5d} instr  loop {len(loop):5d} FFMA {share:4.0%}  loads <= {vectors:3d} bit  {took:5.1f} s"
    )
    bound_by_slots = launch.arguments.get("K") == 7
    return line, local <= SPILLS * len(instructions) and (share >= LEAST or not bound_by_slots)


def machine_code(code: str) -> tuple[list[str], list[str]]:
    """(opcodes, the opcodes of the loop with the most multiply-adds; of several such, the innermost)."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(opcodes)
        elif found := LINE.match(line):
            opcodes.append(found[1])
            target = labels.get(found[3] or "")
            if found[1] == "BRA" and target is not None and target < len(opcodes) - 1:
                loops.append((target, len(opcodes)))
    while opcodes and opcodes[-1] in ("NOP", "BRA"):  # padding, and the branch to itself before it
        opcodes.pop()
    bodies = [opcodes[start:end] for start, end in loops]
    return opcodes, max(bodies, key=lambda body: (body.count("FFMA"), -len(body)), default=[])


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape of each kernel")
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 80], help="compute capability times 10")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--only", default="", help="only names that contain this")
    arguments = parser.parse_args()
    if not isinstance(gnconv_triton._multiply_kernel, triton.JITFunction):
        raise SystemExit("TRITON_INTERPRET is set: unset it, or there is nothing to compile")
    good = True
    for dtype in arguments.dtype:
        for name, call in cases(getattr(torch, dtype), arguments.quick).items():
            if arguments.only not in name:
                continue
            for launch in launches(call):
                for arch in arguments.arch:
                    try:
                        line, fine = compile_one(launch, arch)
                    except Exception as error:
                        line, fine = f"does not compile: {type(error).__name__}: {error}", False
                    good &= fine
                    print(f"sm_{arch} {dtype:8s} {name:44s} {line}{'' if fine else '  <-- BAD'}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
