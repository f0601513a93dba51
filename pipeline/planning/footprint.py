"""Memory of a GPU in a run that is not started: what is held, what a pass keeps, the largest micro-batch that fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from pipeline.config.run import RunConfig
from pipeline.planning import memory
from pipeline.planning.images import images_of
from pipeline.planning.memory import Layout, Peak
from pipeline.planning.rates import GIB, Gpu, GpuRates
from pipeline.planning.subject import Policy, subject_of
from pipeline.planning.trace import Traced, at_batch, trace
from pipeline.training.recipe import parameter_groups

CONTEXT_BYTES = round(1.5 * GIB)  # CUDA's context, NCCL's buffers, cuBLAS's and cuDNN's workspaces
SLACK = 0.04  # of torch's tensors: what its allocator cannot use
_MANY_BLOCKS = 12  # to start a process takes as long as to trace fewer
_LARGEST = 1 << 20


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


class Footprint:
    """Memory of a GPU under one configuration; traces are made once each."""

    def __init__(
        self, config: RunConfig, asked: Asked, tell: Callable[[str], Any] = lambda text: None, device: str = "cuda"
    ) -> None:
        self.config, self.asked, self.tell, self.device = config, asked, tell, device
        self.bf16 = config.train.bf16_on(device)
        self.data = images_of(config, asked.images, asked.classes)
        self.subject = subject_of(config, self.data.classes)
        with torch.device("meta"):
            net = self.subject.net(config.model.checkpointing)
        self.parameters = tuple(parameter.numel() for parameter in net.parameters())
        groups = parameter_groups(net, config.optimizer)
        self.groups = tuple(sum(parameter.numel() for parameter in group["params"]) for group in groups)
        self.blocks = sum(len(list(stage.children())) for stage in self.subject.backbone(net).stages)
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

    def _pass(self, policy: Policy, batch: int) -> tuple[RunConfig, int, Policy, int, bool]:
        """The arguments of `trace`."""
        return self.config, self.data.classes, policy, batch, self.bf16

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
        step = self.subject.multiple
        if not self.fits(policy, ranks, step):
            return 0
        low, high = 1, 2  # in steps: the one fits
        while high * step <= _LARGEST and self.fits(policy, ranks, high * step):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(policy, ranks, middle * step) else (low, middle)
        return low * step

    def _micro_batches(self, part: int) -> list[int]:
        multiple = self.subject.multiple
        return [batch for batch in range(multiple, part + 1, multiple) if part % batch == 0]

    def _image_bytes(self, micro_batch: int) -> int:
        """Of a micro-batch on the device."""
        return 3 * self.subject.side**2 * micro_batch * self.subject.bytes_per_value


def each_stage(policy: Policy) -> tuple[str, ...]:
    return (policy,) if isinstance(policy, str) else policy


def shown(policy: Policy) -> str:
    """As it is written in a command."""
    return policy if isinstance(policy, str) else ",".join(policy)
