"""The plan of a run: memory of a GPU, the largest micro-batch, time and cost on more and more GPUs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch

from pipeline.config.load import Config
from pipeline.config.sections import ConfigError
from pipeline.models.build import build_model
from pipeline.planning import memory
from pipeline.planning.communication import Times, Volume, times, volume
from pipeline.planning.images import Images, LoaderNeed, images_of, loader_need
from pipeline.planning.memory import FP32, Layout, Peak
from pipeline.planning.rates import GIB, Gpu, GpuRates
from pipeline.planning.speed import Range, images_per_second, seconds_per_image
from pipeline.planning.trace import Policy, Traced, at_batch, trace
from pipeline.records.flops import training_flops_per_image
from pipeline.training.recipe import parameter_groups

CONTEXT_BYTES = round(1.5 * GIB)  # CUDA's context, NCCL's buffers, cuBLAS's and cuDNN's workspaces
SLACK = 0.04  # of torch's tensors: what its allocator cannot use
SCALES = (1, 8, 64, 512)
SCALES_WELL = 0.8
# A host launches a block's kernels, forward and backward, in so many seconds: RESULTS.md says 3 ms of a slow core.
_BLOCK_LAUNCHES = (3e-3, 1e-3)
_MANY_BLOCKS = 12  # to start a process takes as long as to trace fewer
_LARGEST = 1 << 20
_UPDATE_PASSES = 9  # AdamW and EMA read and write weights, gradients and states so often


@dataclass(frozen=True)
class Asked:
    """What a user says beside the configuration."""

    gpu: Gpu
    gpus: int
    price: float
    per_node: int
    link_rate: float
    images: int | None = None
    classes: int | None = None
    rates: GpuRates | None = None


@dataclass(frozen=True)
class PolicyRow:
    """A checkpointing policy: bytes an image that are kept, the peak at the micro-batch of the configuration, the
    largest that fits (0: none), and the largest of these that divides a GPU's part of the global batch.
    """

    name: str
    kept_per_image: int
    peak: int
    fits: bool
    largest_micro_batch: int
    largest_that_divides: int


@dataclass(frozen=True)
class ScaleRow:
    """The run on `gpus` GPUs; `memory`: bytes of one of them; `refused`: why it cannot be, else None."""

    gpus: int
    micro_batch: int
    accumulation: int
    step_seconds: Range
    images_per_second: Range
    mfu: Range
    efficiency: Range
    hours: Range
    cost: Range
    volume: Volume
    link: Times
    held_up_by: str
    memory: int
    refused: str | None = None


@dataclass(frozen=True)
class Plan:
    """All of it; bytes, seconds, hours; `peak` is of the configuration's own policy on the GPUs asked for."""

    config: Config
    asked: Asked
    bf16: bool
    data: Images
    parameters: int
    steps: int
    peak: Peak
    moments: Sequence[Peak]
    fixed_bytes: int
    policies: Sequence[PolicyRow]
    row: ScaleRow
    scales: Sequence[ScaleRow]
    loader: LoaderNeed
    by_stage: Mapping[int, tuple[Volume, Times, int]]
    stops_at: str
    assumptions: Sequence[str]


class Planner:
    """Plans of one configuration; traces are made once each."""

    def __init__(
        self, config: Config, asked: Asked, tell: Callable[[str], Any] = lambda text: None, device: str = "cuda"
    ) -> None:
        self.config, self.asked, self.tell, self.device = config, asked, tell, device
        self.bf16 = config.train.bf16_on(device)
        self.side = config.data.largest_resolution
        self.data = images_of(config, asked.images, asked.classes)
        with torch.device("meta"):
            net = build_model(config.model, self.data.classes, self.side)
        self.parameters = tuple(parameter.numel() for parameter in net.parameters())
        groups = parameter_groups(net, config.optimizer)
        self.groups = tuple(sum(parameter.numel() for parameter in group["params"]) for group in groups)
        self.blocks = sum(len(list(stage.children())) for stage in net.stages)
        self.fused = config.model.compile or asked.gpu.has_kernels
        self._traces: dict[tuple[Policy, int], Traced] = {}

    def effective(self, policy: Policy) -> Policy:
        """What runs in its place: our kernels are spelled as selective alone."""
        if self.config.model.compile or not self.asked.gpu.has_kernels or self.device == "cpu":
            return policy
        if isinstance(policy, str):
            return "selective" if policy == "none" else policy
        return tuple("selective" if each == "none" else each for each in policy)

    def traced(self, policy: Policy, batch: int) -> Traced:
        """A pass at `batch`: traced at the micro-batch of the configuration, at others on a line through two traces."""
        policy, micro = self.effective(policy), self.config.train.micro_batch
        wanted = (micro,) if batch == micro else (micro, 2 * micro)
        for each in wanted:
            if (policy, each) not in self._traces:
                self.tell(f"tracing {shown(policy)}, {each} images")
                self._traces[policy, each] = trace(*self._pass(policy, each))
        passes = [self._traces[policy, each] for each in wanted]
        return passes[0] if batch == micro else at_batch(passes[0], passes[1], batch)

    def _pass(self, policy: Policy, batch: int) -> tuple[Config, int, int, Policy, int, bool]:
        """The arguments of `trace`."""
        return self.config, self.data.classes, self.side, policy, batch, self.bf16

    def trace_all(self, policies: Sequence[Policy]) -> None:
        """Trace several policies, each pass in a process of its own, where that is faster than one after another."""
        wanted = list(dict.fromkeys(map(self.effective, policies)))
        cores = len(os.sched_getaffinity(0))
        if len(wanted) < 2 or cores < 2 or self.blocks < _MANY_BLOCKS:
            return
        micro = self.config.train.micro_batch
        keys = [(policy, batch) for policy in wanted for batch in (micro, 2 * micro)]
        self.tell(f"tracing {len(wanted)} policies")
        with ProcessPoolExecutor(min(cores, len(keys)), mp_context=get_context("spawn")) as pool:
            passes = {key: pool.submit(trace, *self._pass(*key)) for key in keys}
            for done, key in enumerate(keys, start=1):
                self._traces[key] = passes[key].result()
                self.tell(f"traced {done} of {len(keys)} passes")

    def layout(self, ranks: int, accumulation: int) -> Layout:
        ema = self.config.optimizer.ema_decay is not None
        stage = self.config.train.zero_stage
        return Layout(self.parameters, self.groups, ranks, stage, accumulation, ema, self.device == "cuda")

    def moments(self, policy: Policy, ranks: int, micro_batch: int) -> list[Peak]:
        """Of a GPU. `ranks` and `micro_batch` have to divide the global batch."""
        accumulation = max(1, self.config.train.global_batch // (ranks * micro_batch))
        traced = self.traced(policy, micro_batch)
        casts = max(0, self.traced(policy, 0).saved) if self.bf16 else 0
        return memory.peaks(self.layout(ranks, accumulation), traced, casts, self._image_bytes(micro_batch))

    def peak(self, policy: Policy, ranks: int, micro_batch: int) -> Peak:
        return max(self.moments(policy, ranks, micro_batch), key=lambda each: each.total)

    def with_slack(self, found: Peak) -> int:
        """Bytes of the GPU that this peak takes."""
        return CONTEXT_BYTES + round(found.total * (1 + SLACK))

    def fits(self, policy: Policy, ranks: int, micro_batch: int) -> bool:
        return self.with_slack(self.peak(policy, ranks, micro_batch)) <= self.asked.gpu.memory

    def largest_micro_batch(self, policy: Policy, ranks: int) -> int:
        """That fits, whether or not it divides anything; 0 where none does."""
        step = self._multiple
        if not self.fits(policy, ranks, step):
            return 0
        low, high = 1, 2  # in steps: the one fits
        while high * step <= _LARGEST and self.fits(policy, ranks, high * step):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(policy, ranks, middle * step) else (low, middle)
        return low * step

    @property
    def _multiple(self) -> int:
        """Mixup and cutmix pair images."""
        augment = self.config.augment
        return 2 if augment.mixup_alpha or augment.cutmix_alpha else 1

    def _micro_batches(self, part: int) -> list[int]:
        return [batch for batch in range(self._multiple, part + 1, self._multiple) if part % batch == 0]

    def _image_bytes(self, micro_batch: int) -> int:
        """Of a micro-batch on the device: as fp32, and as bytes where the device augments."""
        values = 3 * self.side**2 * micro_batch
        return values * (FP32 + (1 if self.config.augment.where == "device" else 0))

    def plan(self, policies: Sequence[Policy]) -> Plan:
        """The whole plan, with a row for each of `policies`. Raises ConfigError where GPUs do not divide the batch."""
        config, asked = self.config, self.asked
        config.train.accumulation_steps(asked.gpus)
        own, ranks, micro = config.model.checkpointing, asked.gpus, config.train.micro_batch
        self.trace_all([*policies, own])
        moments = self.moments(own, ranks, micro)
        peak = max(moments, key=lambda each: each.total)
        rows = [self._policy_row(each) for each in dict.fromkeys([*policies, own])]
        row = self.scale(ranks)
        scales = [self.scale(count) for count in sorted({*SCALES, ranks})]
        node = min(ranks, asked.per_node)
        loader = loader_need(config, self.data, row.images_per_second.high / ranks * node)
        accumulation = config.train.accumulation_steps(ranks)
        by_stage = {}
        for stage in range(4):
            moved = self._volume(stage, accumulation, ranks)
            states = memory.held(replace(self.layout(ranks, accumulation), zero_stage=stage))
            by_stage[stage] = (moved, self._times(moved, ranks), sum(states.values()))
        steps = self.data.steps_per_epoch * config.train.epochs
        return Plan(
            *(config, asked, self.bf16, self.data, sum(self.parameters), steps, peak, moments),
            *(self.with_slack(peak) - peak.total, rows, row, scales, loader, by_stage, _stops_at(scales)),
            self._assumptions(),
        )

    def _policy_row(self, policy: Policy) -> PolicyRow:
        ranks, micro = self.asked.gpus, self.config.train.micro_batch
        peak = self.with_slack(self.peak(policy, ranks, micro))
        kept = self.traced(policy, 2).saved - self.traced(policy, 1).saved
        largest = self.largest_micro_batch(policy, ranks)
        part = self.config.train.global_batch // ranks
        divides = max((each for each in self._micro_batches(part) if each <= largest), default=0)
        return PolicyRow(shown(policy), kept, peak, peak <= self.asked.gpu.memory, largest, divides)

    def _volume(self, stage: int, accumulation: int, ranks: int) -> Volume:
        return volume(sum(self.parameters), stage, accumulation, ranks)

    def _times(self, moved: Volume, ranks: int) -> Times:
        return times(moved, ranks, self.asked.gpu, self.asked.per_node, self.asked.link_rate, self.asked.rates)

    def _image_seconds(self) -> Range:
        """Of the run's mean image: progressive resolutions cost by their area."""
        config, policy = self.config, self.config.model.checkpointing
        traced = self.traced(policy, config.train.micro_batch)
        seconds = seconds_per_image(traced, self.asked.gpu, self.bf16, self.fused, self.asked.rates)
        rates, key = self.asked.rates, (config.model.name, self.side, shown(policy), "bf16" if self.bf16 else "fp32")
        known = rates.train_rate(*key) if rates is not None else None
        seconds = images_per_second(seconds, known).inverse
        return seconds * self._mean_area

    @property
    def _mean_area(self) -> float:
        """Of the run's images, as a share of the largest ones'."""
        sides = [self.config.data.resolution_at(epoch) for epoch in range(self.config.train.epochs)]
        return sum((side / self.side) ** 2 for side in sides) / len(sides)

    def scale(self, ranks: int) -> ScaleRow:
        """The run on so many GPUs, with the micro-batch of the configuration or the next smaller one that divides."""
        config, asked, train = self.config, self.asked, self.config.train
        nothing = Range(math.nan, math.nan)
        if train.global_batch % ranks or not (possible := self._micro_batches(train.global_batch // ranks)):
            why = f"{ranks} GPUs do not divide train.global_batch {train.global_batch}"
            if train.global_batch % ranks == 0:
                why = f"a GPU's {train.global_batch // ranks} images cannot be paired for mixup"
            moved = self._volume(train.zero_stage, 1, ranks)
            figures = (nothing, nothing, nothing, nothing, nothing, nothing)
            return ScaleRow(ranks, 0, 0, *figures, moved, self._times(moved, ranks), "the batch", 0, refused=why)
        part = train.global_batch // ranks
        micro = max((each for each in possible if each <= train.micro_batch), default=min(possible))
        accumulation = part // micro
        moved = self._volume(train.zero_stage, accumulation, ranks)
        link = self._times(moved, ranks)
        step, lost = self._step(ranks, accumulation, link)
        rate = Range(train.global_batch / step.low, train.global_batch / step.high)
        flops = training_flops_per_image(config.model, self.data.classes, self.side) * self._mean_area
        mfu = rate * (flops / ranks / asked.gpu.peak_flops(self.bf16))
        single = max(each for each in self._micro_batches(train.global_batch) if each <= train.micro_batch)
        alone, _ = self._step(1, train.global_batch // single, Times(0.0, 0.0, "none"))
        shares = sorted((alone.low / step.low / ranks, alone.high / step.high / ranks))
        hours = step * (self.data.steps_per_epoch * train.epochs / 3600)
        held_up = max(lost, key=lambda name: lost[name])
        if lost[held_up] < 0.05 * step.low:
            held_up = "computing"
        taken = self.with_slack(self.peak(config.model.checkpointing, ranks, micro))
        if taken > asked.gpu.memory:
            held_up = f"memory: {taken / GIB:.1f} of {asked.gpu.memory / GIB:.1f} GiB, does not fit"
        return ScaleRow(
            *(ranks, micro, accumulation, step, rate, mfu, Range(*shares), hours, hours * (ranks * asked.price)),
            *(moved, link, held_up, taken),
        )

    def _step(self, ranks: int, accumulation: int, link: Times) -> tuple[Range, dict[str, float]]:
        """Seconds of a step, and of them at the slow end what is not computing, by what it is."""
        config, image = self.config, self._image_seconds()
        part, elements = config.train.global_batch // ranks, sum(self.parameters)
        states = elements if config.train.zero_stage == 0 else self.layout(ranks, accumulation).part(elements)
        update = _UPDATE_PASSES * FP32 * states / self.asked.gpu.memory_rate
        ends = []
        for end, seconds in enumerate((image.low, image.high)):
            launching = accumulation * self.blocks * _BLOCK_LAUNCHES[end]
            # DeepSpeed sends after, or between, the work at stages 0 to 2; at 3 beside it, where it can.
            sending = (link.ring, link.best)[end]
            busy = max(part * seconds, launching) + update
            ends.append(max(busy, sending) if config.train.zero_stage == 3 and end else busy + sending)
        waiting = accumulation * self.blocks * _BLOCK_LAUNCHES[0] - part * image.low
        lost = {f"the link {link.link}": link.ring, "the host, which launches kernels": waiting, "AdamW": update}
        return Range(*ends), lost

    def _assumptions(self) -> list[str]:
        asked, config, rates = self.asked, self.config, self.asked.rates
        found = [
            f"images and classes: {self.data.known_by}",
            f"a GPU holds {CONTEXT_BYTES / GIB:.1f} GiB beside torch's tensors; {100 * SLACK:.0f} % of those are slack",
            "activations: traced by plain PyTorch's operators with drop path off; our kernels need no more",
            f"{asked.per_node} GPUs a node; between nodes {asked.link_rate * 8 / 1e9:g} Gbit/s a GPU, 90 % reached; "
            f"inside {asked.gpu.node_rate / 1e9:g} GB/s, 80 % reached",
            "sending is not hidden behind computing at ZeRO 0 to 2",
            "a core makes 560 to 650 images a second (68 kB; `bench-data` measures yours)",
            "evaluations, checkpoints and waiting for data are not in the hours",
        ]
        if rates is None:
            found.insert(3, "speed: from the data sheet, 50 to 75 % of its products and 75 to 90 % of its bandwidth")
        else:
            found.insert(3, f"speed: {asked.gpu.kind} as measured, where --gpu-rates has it")
        if asked.gpu.has_kernels and not config.model.compile and "none" in _each(config.model.checkpointing):
            found.append("model.checkpointing none keeps what selective does where our kernels run")
        return found


def _each(policy: Policy) -> tuple[str, ...]:
    return (policy,) if isinstance(policy, str) else policy


def shown(policy: Policy) -> str:
    """As it is written in a command."""
    return policy if isinstance(policy, str) else ",".join(policy)


def _stops_at(scales: Sequence[ScaleRow]) -> str:
    for row in scales:
        if row.refused:
            return f"{row.gpus} GPUs: {row.refused}"
        if row.efficiency.low < SCALES_WELL:
            share = f"{100 * row.efficiency.low:.0f} to {100 * row.efficiency.high:.0f} %"
            return f"{row.gpus} GPUs: {share} of as many single ones; what holds it up is {row.held_up_by}"
    return f"not up to {scales[-1].gpus} GPUs"


def check_asked(
    gpus: int, price: float, per_node: int, link_gbps: float | None, images: int | None, classes: int | None
) -> None:
    """Raises ConfigError for what cannot be."""
    counts = {"--gpus": gpus, "--gpus-per-node": per_node, "--link-gbps": link_gbps, "--images": images}
    for name, value in {**counts, "--classes": classes}.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} {value:g} has to be above 0")
    if not 0 <= price < math.inf:
        raise ConfigError(f"--price {price:g} has to be a price of a GPU-hour, 0 or more")
