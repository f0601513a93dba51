"""DeepSpeed, and all that has to be known about it: the only file that imports it.

DeepSpeed's dictionary is derived from `Config`; nothing is declared twice. What DeepSpeed 0.19.8 gets wrong is worked
around here, each with the reason beside it.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")  # no nvcc warning on import: nothing is compiled here
# Where mlflow is installed DeepSpeed 0.19.8 imports it, for its autotuner: seconds on every rank. Now it seems missing.
if _mlflow_is_new := "mlflow" not in sys.modules:
    sys.modules["mlflow"] = None  # type: ignore[assignment]
import deepspeed
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

if _mlflow_is_new:
    del sys.modules["mlflow"]

from pipeline.config.run import RunConfig
from pipeline.models.graphs import capture
from pipeline.models.hornet import HorNet
from pipeline.ops import kernels
from pipeline.ranks.collectives import (
    Ranks,
    be_alone_without_launcher,
    gather,
    local_ranks,
    max_over_ranks,
    own_threads,
    sum_over_ranks,
)
from pipeline.training.recipe import REDUCE_BUCKET_ELEMENTS, AdamWithEma, Loss

Judge = Callable[[float, float], str | None]


class StepResult(NamedTuple):
    """One optimizer step, as every rank knows it.

    loss: mean over all micro-batches of all ranks; grad_norm: L2 norm of the accumulated gradient before clipping, inf
    where it is not finite; refused: why no update was made, or None; stop: some rank was asked to stop; micro_losses:
    (accumulation,) of this rank alone, on the device.
    """

    loss: float
    grad_norm: float
    refused: str | None
    stop: bool
    micro_losses: torch.Tensor


def start_ranks(store: dist.Store | None = None) -> tuple[Ranks, torch.device]:
    """Join the process group that the launcher describes, or make one of a single rank where there is no launcher; by
    `store` if the ranks have met there (rendezvous.py).

    NCCL on GPUs, gloo on CPU. Sets this rank's device and its share of the host's threads.
    """
    logger.setLevel(logging.WARNING)
    be_alone_without_launcher()  # DeepSpeed would look for MPI
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        # Drop path leaves out samples, so that sizes change from step to step: fixed segments would fragment.
        if "PYTORCH_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(local_rank)
    else:
        # Otherwise DeepSpeed compiles its shared-memory collectives (100 s, a compiler) and leaks /dev/shm.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend, timeout = "nccl" if on_gpu else "gloo", timedelta(minutes=30)
    if store is not None:
        own = dist.PrefixStore("group", store)
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=own, rank=rank, world_size=count, timeout=timeout)
    deepspeed.init_distributed(backend, verbose=False, timeout=timeout)
    if on_gpu:
        agree_on_kernels(kernels.why_not(local_rank))  # tried before the run, not within its first step
    count = dist.get_world_size()
    torch.set_num_threads(own_threads(local_ranks(torch.cuda.device_count() if on_gpu else count)))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return Ranks(dist.get_rank(), count), device


def agree_on_kernels(why_not: str | None) -> None:
    """Turn the Triton kernels off on all ranks where `why_not` says on one of them why they cannot run there."""
    reasons = {rank: reason for rank, reason in enumerate(gather(why_not)) if reason is not None}
    if reasons:
        rank, reason = next(iter(reasons.items()))
        if dist.get_rank() == 0 and len(reasons) < dist.get_world_size():
            logger.warning(f"Triton kernels are off on all ranks: on {len(reasons)}, first rank {rank}: {reason}")
        kernels.turn_off(reason)


def stop_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def deepspeed_config(config: RunConfig, ranks: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's dictionary for this run."""
    # At stage 0 DeepSpeed clips without telling the norm: `_clip` does both.
    clip = config.optimizer.clip_grad_norm if config.train.zero_stage else 0.0
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.train.accumulation_steps(ranks),
        "gradient_clipping": clip,
        "zero_optimization": {"stage": config.train.zero_stage, "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS},
        "zero_allow_untested_optimizer": True,  # AdamWithEma is AdamW plus one state tensor
        # Autocast, not DeepSpeed's bf16 mode: that mode keeps bf16 weights, in which an EMA at 0.9999 does not move.
        # No "safe modules": their gradients would be summed over ranks in bf16.
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 2**31,
    }


def _finite(loss: float, grad_norm: float) -> str | None:
    return None if math.isfinite(loss) and math.isfinite(grad_norm) else "the loss or the gradient is not finite"


class _Verdict:
    """The judge's word on one step: asked once, although AdamW updates group by group."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.norm = math.inf
        self._said: list[str | None] = []

    def allows(self, loss: float, grad_norm: Callable[[], float]) -> bool:
        if not self._said:
            self.norm = grad_norm()
            self._said.append(self.judge(loss, self.norm))
        return self._said[0] is None

    def reason(self, loss: float) -> str | None:
        """Why there was no update, or None."""
        self.allows(loss, lambda: math.inf)
        return self._said[0]


class Engine:
    """A model under DeepSpeed ZeRO: one call a step, and its whole state as full tensors by parameter name."""

    def __init__(self, config: RunConfig, model: nn.Module, optimizer: AdamWithEma, ranks: Ranks, device: torch.device):
        self.ranks, self.device = ranks, device
        self.bf16 = config.train.bf16_on(device.type)
        self.zero_stage = config.train.zero_stage
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model.to(device), optimizer=optimizer, config=deepspeed_config(config, ranks.count, self.bf16)
        )
        if config.model.cuda_graphs:
            # Now: DeepSpeed has moved the weights to where they stay, and no thread of a loader uses the GPU yet.
            assert isinstance(model, HorNet)
            side, autocast = config.data.resolution, torch.bfloat16 if self.bf16 else None
            capture(model, config.train.micro_batch, side, autocast)
        self.updates = 0  # made so far, over all tries of the run: AdamW's step count
        self._clip_at = config.optimizer.clip_grad_norm
        self._inner: AdamWithEma = self.optimizer.optimizer if self.zero_stage else self.optimizer
        self._parameters = dict(self.engine.module.named_parameters())
        # DeepSpeed links state to parameters inside the first group's first step, when the other groups have none
        # yet, and later cannot find theirs. With every state there from the start, the links are whole.
        for partition in self._flat_partitions():
            self._inner.init_state(partition)
        if self.zero_stage in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def train_step(
        self,
        micro_batches: Iterable[tuple[Any, Any]],
        loss: Loss,
        judge: Judge = _finite,
        stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Forward and backward of every (inputs, targets) of one optimizer step, one clipping, one update.

        `judge` gets the loss and the norm of the gradient, the same on all ranks, and returns why there should be no
        update, or None. `stop` tells whether this rank was asked to stop. A collective, with two reads of the device.
        """
        self.engine.train()
        losses: list[torch.Tensor] = []
        mean, asked, verdict = math.nan, 0.0, _Verdict(judge)
        for inputs, targets in micro_batches:
            value = loss(self.engine(inputs), targets)
            self.engine.backward(value)
            losses.append(value.detach())
            if self.engine.is_gradient_accumulation_boundary():
                ours = torch.stack([torch.stack(losses).double().mean(), value.new_tensor(float(stop())).double()])
                mean, asked = sum_over_ranks(ours).tolist()
                mean /= self.ranks.count
                if self.zero_stage == 0:
                    self._clip()
                self._inner.may_update = partial(verdict.allows, mean, self._norm)
            self.engine.step()  # DeepSpeed updates at the last micro-batch of the accumulation alone
        # Where a gradient is not finite, DeepSpeed leaves at stages 1 to 3 before it asks.
        refused = verdict.reason(mean)
        self.updates += refused is None
        return StepResult(mean, verdict.norm, refused, asked > 0, torch.stack(losses))

    def full_state(self, state: str, everywhere: bool = False) -> dict[str, torch.Tensor]:
        """Full fp32 tensors by parameter name, on the CPU of rank 0, or of every rank with `everywhere`.

        `state` is "model" for the weights or one of `state_names`. A collective: all ranks must call it.
        """
        gathered = self._gather(state) if self.zero_stage in (1, 2) and state != "model" else {}
        full = {}
        for name, parameter in self._parameters.items():
            if state == "model":
                # Below stage 3 every rank has the whole fp32 weights, and nothing need be gathered.
                value = safe_get_full_fp32_param(parameter) if self.zero_stage == 3 else parameter
            elif self.zero_stage == 0:
                value = self._inner.state[parameter][state]
            elif self.zero_stage == 3:
                value = safe_get_full_optimizer_state(parameter, state)
            else:
                value = gathered[name]
            if everywhere or self.ranks.rank == 0:
                # DeepSpeed returns a buffer of its own or a view: a copy in any case.
                full[name] = value.detach().to("cpu", copy=True)
        return full

    def _gather(self, state: str) -> dict[str, torch.Tensor]:
        """A state at stages 1 and 2, by parameter name, as views of one tensor a group.

        DeepSpeed's own getter sums zero-filled tensors of full size, parameter by parameter: a fifth as fast.
        """
        found = {}
        groups = zip(self.optimizer.bit16_groups_flat, self._flat_partitions(), strict=True)
        for flat, partition in groups:
            whole = torch.empty_like(flat)
            dist.all_gather_into_tensor(whole, self._inner.state[partition][state])
            begin, size = flat.data_ptr(), flat.element_size()
            for name, parameter in self._parameters.items():
                offset = (parameter.data_ptr() - begin) // size  # parameters are views of their group's flat tensor
                if 0 <= offset < flat.numel():
                    found[name] = whole.narrow(0, offset, parameter.numel()).view_as(parameter)
        return found

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the weights, full tensors by parameter name, while the run is under way.

        (Those of the start are loaded into the model before the engine is built.)
        """
        for name, parameter in self._parameters.items():
            value = tensors[name].to(self.device, torch.float32)
            if self.zero_stage == 3:
                part = self._part(parameter, value)
                safe_set_local_fp32_param(parameter, part)
                parameter.ds_tensor.copy_(part)
            else:
                parameter.copy_(value)
        if self.zero_stage == 3:
            # Small parameters are kept whole on every rank, and gathered anew after each step alone.
            kept = self.optimizer.persistent_parameters
            if kept:
                kept[0].partition(kept)
                kept[0].all_gather(kept)
        elif self.zero_stage:
            self.optimizer.refresh_fp32_params()

    @torch.no_grad()
    def load_state(self, states: Mapping[str, Mapping[str, torch.Tensor]], updates: int) -> None:
        """Set optimizer states (name -> parameter name -> full tensor), and `updates`, AdamW's step count."""
        for state, tensors in states.items():
            for name, parameter in self._parameters.items():
                value = tensors[name].to(self.device, torch.float32)
                if self.zero_stage == 3:
                    safe_set_local_optimizer_state(parameter, self._part(parameter, value), state)
                elif self.zero_stage == 0:
                    self._inner.state[parameter][state].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, state)
        for partition in self._flat_partitions():
            self._inner.state[partition]["step"].fill_(float(updates))
        self.updates = updates

    @property
    def state_names(self) -> tuple[str, ...]:
        """Optimizer states that `full_state` takes: exp_avg, exp_avg_sq and, with an EMA, ema."""
        return self._inner.state_names

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in self._parameters.values())

    def _norm(self) -> float:
        """Of the step under way: DeepSpeed's optimizers know it by the time that they step AdamW."""
        return self._clipped_norm if self.zero_stage == 0 else float(self.optimizer._global_grad_norm)

    def _clip(self) -> None:
        """Clip the gradients, whole on every rank at stage 0."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        # The same gradients on every rank, but unlike processors may sum them up unlike: the verdict has to be one.
        norm = max_over_ranks(torch.nn.utils.get_total_norm(gradients))
        if self._clip_at:
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._clip_at, norm)
        self._clipped_norm = float(norm)

    def _part(self, parameter: Any, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of a full tensor at stage 3: DeepSpeed's own setter of full tensors fails where the size
        is not divisible by the ranks.
        """
        size = parameter.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, size * self.ranks.count - value.numel()))
        return padded.narrow(0, size * self.ranks.rank, size)

    def _flat_partitions(self) -> list[torch.Tensor]:
        if self.zero_stage == 0:
            return list(self._parameters.values())
        if self.zero_stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups
