"""The models that are run: ours, the published structure, ConvNeXt-L; their train step."""

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.hornet import HorNet
from tests.bench.published import DEPTHS, GF_STAGES, PublishedHorNet, widths
from tests.gpu.timing import Bench

POLICIES = ("none", "selective", "selective_mlp", "block")


def hornet(kind: str, first: int, depths: Sequence[int], px: int, drop_path: float, **more: Any) -> HorNet:
    """`kind`: "7x7" or "gf", with filters stored for `px`. `first`: width of the first stage."""
    filters = {"global_filter_stages": GF_STAGES, "img_size": px} if kind == "gf" else {}
    return HorNet(dims=widths(first), depths=depths, drop_path_rate=drop_path, **filters, **more)


def build(device: torch.device, tiny: bool, kind: str, what: str, px: int, drop_path: float) -> nn.Module:
    """HorNet-L or ConvNeXt-L (`what`: "ours", "published" or else); something small of the sort where `tiny`."""
    first, depths = (16, (1, 1, 2, 1)) if tiny else (192, DEPTHS)
    with device:
        if what == "ours":
            return hornet(kind, first, depths, px, drop_path).train()
        if what == "published":
            gf = kind == "gf"
            return PublishedHorNet(widths(first), depths, gf=gf, img_size=px, drop_path_rate=drop_path).train()
        return timm.create_model("convnext_atto" if tiny else "convnext_large", drop_path_rate=drop_path).train()


def gmacs(tiny: bool, kind: str, what: str, px: int) -> float:
    """Of one image's forward pass: convolutions and matrix products, GF without its transforms."""
    model = build(torch.device("meta"), tiny, kind, what, px, 0.0).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, px, px, device="meta"))
    return counter.get_total_flops() / 2e9


def set_policy(model: nn.Module, policy: str) -> bool:
    """Whether the model has this policy; if so, it is set."""
    if not hasattr(model, "set_checkpointing"):
        return False
    model.set_checkpointing(policy)
    return True


def compile_blocks(model: nn.Module, tiny: bool) -> None:
    """Each block by itself, as our own method does. tiny: without a compiler, which takes a CPU a minute a model."""
    options = {"backend": "aot_eager"} if tiny else {}
    if hasattr(model, "compile_blocks"):
        model.compile_blocks(**options)
        return
    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if type(module).__name__.endswith("Block"):
            module.compile(dynamic=False, **options)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def train_step(bench: Bench, model: nn.Module, batch: int, px: int) -> Callable[[], None]:
    """Forward, cross-entropy, backward in bf16 autocast on images that stay; no optimizer."""
    x = torch.randn(batch, 3, px, px, device=bench.device)
    labels = torch.randint(0, 1000, (batch,), device=bench.device)
    # Its search pays for shapes that stay, as the baselines' do; ours change with what drop path leaves.
    torch.backends.cudnn.benchmark = not isinstance(model, HorNet)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(bench.device, torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()

    return step


def measure_step(bench: Bench, model: nn.Module, batch: int, px: int, quick: bool = False) -> tuple[float, int] | str:
    """(images per second, peak bytes) of a train step in bf16, or why there is none."""
    step = train_step(bench, model, batch, px)
    if not bench.tiny:
        torch.cuda.reset_peak_memory_stats()
    options: dict[str, Any] = {"warm_up": 1, "budget": 0.0, "least": 2} if quick else {"warm_up": 3, "budget": 2.0}
    took = bench.attempt(step, **options)
    if isinstance(took, str):
        return took
    return batch / took, 0 if bench.tiny else torch.cuda.max_memory_allocated()


def batch_at(bench: Bench, px: int) -> int:
    """As many pixels at every size as `--batch` has at 384."""
    return max(1, round(bench.args.batch * (384 / px) ** 2 / 8) * 8)


def search(bench: Bench, model: nn.Module, px: int) -> tuple[int, float, int] | None:
    """(largest batch in eights, images/s, peak bytes): a guess from two small ones by a line, then halving."""
    parameters = sum(p.numel() for p in model.parameters())
    states = torch.empty(3 * parameters, device=bench.device)  # AdamW's and an EMA, which the step does not make
    step = 2 if bench.tiny else 8
    best: tuple[int, float, int] | None = None
    peaks = []
    for batch in (step, 2 * step):
        if isinstance(measured := measure_step(bench, model, batch, px, quick=True), str):
            return best
        best = (batch, *measured)
        peaks.append(measured[1])
    guess = 3 * step
    if not bench.tiny:
        free = torch.cuda.get_device_properties(0).total_memory - peaks[1]
        guess = 2 * step + int(free / max((peaks[1] - peaks[0]) / step, 1.0))
    low, high = 2 * step, max(3 * step, int(1.1 * guess) // step * step)
    trial = int(0.95 * guess)
    while high > low:
        trial = min(max(trial // step * step, low + step), high)
        bench.clear()
        if isinstance(measured := measure_step(bench, model, trial, px, quick=True), str):
            high = trial - step
        else:
            low, best = trial, (trial, *measured)
        if bench.late(f"the end of a search: {low} fits, more than {high} does not"):
            break
        trial = (low + high + step) // 2
    del states
    return best
