"""The plan of a run: memory of a GPU, the largest micro-batch, time and cost on more and more GPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.config.load import Config
from pipeline.config.run import RunConfig
from pipeline.config.sections import ConfigError
from pipeline.planning import memory
from pipeline.planning.communication import Times, Volume, times, volume
from pipeline.planning.footprint import CONTEXT_BYTES, SLACK, Asked, Footprint, each_stage, shown
from pipeline.planning.images import Images, LoaderNeed, loader_need
from pipeline.planning.memory import FP32, Peak
from pipeline.planning.rates import GIB
from pipeline.planning.speed import Range, images_per_second, seconds_per_image
from pipeline.planning.subject import Policy

SCALES = (1, 8, 64, 512)
SCALES_WELL = 0.8
# A host launches a block's kernels, forward and backward, in so many seconds: RESULTS.md says 3 ms of a slow core.
_BLOCK_LAUNCHES = (3e-3, 1e-3)
_UPDATE_PASSES = 9  # AdamW and EMA read and write weights, gradients and states so often


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

    config: RunConfig
    asked: Asked
    bf16: bool
    data: Images
    side: int
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


class Planner(Footprint):
    """Plans of one configuration."""

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
            *(config, asked, self.bf16, self.data, self.subject.side, sum(self.parameters), steps, peak, moments),
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
        rates, key = (
            self.asked.rates,
            (config.model.name, self.subject.side, shown(policy), "bf16" if self.bf16 else "fp32"),
        )
        # What was measured is of nets that classify.
        known = rates.train_rate(*key) if rates is not None and isinstance(config, Config) else None
        seconds = images_per_second(seconds, known).inverse
        return seconds * self._mean_area

    @property
    def _mean_area(self) -> float:
        """Of the run's images, as a share of the largest ones'."""
        sides = [self.subject.side_at(epoch) for epoch in range(self.config.train.epochs)]
        return sum((side / self.subject.side) ** 2 for side in sides) / len(sides)

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
        flops = self.subject.training_flops() * self._mean_area
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
        if asked.gpu.has_kernels and not config.model.compile and "none" in each_stage(config.model.checkpointing):
            found.append("model.checkpointing none keeps what selective does where our kernels run")
        if config.model.cuda_graphs:
            twice = FP32 * sum(self.parameters) / GIB
            found.append(
                f"model.cuda_graphs: counted are neither the {twice:.1f} GiB that gradients take once more, nor the "
                "launches that it saves, nor what drop path drops"
            )
        return found


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
