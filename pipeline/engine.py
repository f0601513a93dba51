"""DeepSpeed, and all that has to be known about it: the only file that imports it.

DeepSpeed's dictionary is derived from `Config`; nothing is declared twice. What DeepSpeed 0.19.8 gets wrong is worked
around here, each with the reason beside it.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")  # no nvcc warning on import: nothing is compiled here
import deepspeed
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)

from pipeline.config import Config
from pipeline.data.loader import Ranks
from pipeline.recipe import AdamWithEma, Loss


class StepResult(NamedTuple):
    """loss: mean over this rank's micro-batches, still on the device; grad_norm: L2 norm before clipping.

    grad_norm is inf where a gradient was not finite: DeepSpeed then leaves out the update on all ranks.
    """

    loss: torch.Tensor
    grad_norm: float | torch.Tensor


def start_ranks() -> tuple[Ranks, torch.device]:
    """Join the process group that the launcher describes, or make one of a single rank where there is no launcher.

    NCCL on GPUs, gloo on CPU. Sets this rank's device and its share of the host's threads.
    """
    logger.setLevel(logging.WARNING)
    if "RANK" not in os.environ:  # DeepSpeed would look for MPI here
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        # Otherwise DeepSpeed compiles its shared-memory collectives (100 s, a compiler) and leaks /dev/shm.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False, timeout=timedelta(minutes=30))
    count = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count() if on_gpu else count))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return Ranks(dist.get_rank(), count), device


def stop_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()


def from_rank_0(value: Any) -> Any:
    """Rank 0's `value` (any picklable object), on every rank."""
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all ranks, on all of them."""
    dist.all_reduce(values)
    return values


def deepspeed_config(config: Config, ranks: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's dictionary for this run."""
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.train.accumulation_steps(ranks),
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "zero_optimization": {"stage": config.train.zero_stage},
        "zero_allow_untested_optimizer": True,  # AdamWithEma is AdamW plus one state tensor
        # Autocast, not DeepSpeed's bf16 mode: that mode keeps bf16 weights, in which an EMA at 0.9999 does not move.
        # No "safe modules": their gradients would be summed over ranks in bf16.
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 2**31,
    }


class Engine:
    """A model under DeepSpeed ZeRO: one call a step, and its whole state as full tensors by parameter name."""

    def __init__(self, config: Config, model: nn.Module, optimizer: AdamWithEma, ranks: Ranks, device: torch.device):
        self.ranks, self.device = ranks, device
        self.bf16 = config.train.bf16_on(device.type)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model.to(device), optimizer=optimizer, config=deepspeed_config(config, ranks.count, self.bf16)
        )
        self.zero_stage = config.train.zero_stage
        self._skipped_before = 0
        self._inner: AdamWithEma = self.optimizer.optimizer
        self._parameters = dict(self.engine.module.named_parameters())
        # DeepSpeed links state to parameters inside the first group's first step, when the other groups have none
        # yet, and later cannot find theirs. With every state there from the start, the links are whole.
        for partition in self._flat_partitions():
            self._inner.init_state(partition)
        if self.zero_stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def train_step(self, micro_batches: Iterable[tuple[torch.Tensor, torch.Tensor]], loss: Loss) -> StepResult:
        """Forward and backward of every (images, targets) of one optimizer step, one clipping, one update."""
        self.engine.train()
        total = torch.zeros((), device=self.device)
        count = 0
        for images, targets in micro_batches:
            value = loss(self.engine(images), targets)
            self.engine.backward(value)
            self.engine.step()  # DeepSpeed updates at the last micro-batch of the accumulation alone
            total += value.detach()
            count += 1
        return StepResult(total / count, self.engine.get_global_grad_norm())

    def full_state(self, state: str, everywhere: bool = False) -> dict[str, torch.Tensor]:
        """Full fp32 tensors by parameter name, on the CPU of rank 0, or of every rank with `everywhere`.

        `state` is "model" for the weights or one of `state_names`. A collective: all ranks must call it.
        """
        full = {}
        for name, parameter in self._parameters.items():
            if state == "model":
                value = safe_get_full_fp32_param(parameter)
            else:
                value = safe_get_full_optimizer_state(parameter, state)
            if everywhere or self.ranks.rank == 0:
                full[name] = value.detach().clone().cpu()
        return full

    def load_state(self, states: Mapping[str, Mapping[str, torch.Tensor]], steps_done: int, skipped: int) -> None:
        """Set optimizer states (name -> parameter name -> full tensor) and the step count of AdamW's bias correction.

        `skipped` of the `steps_done` steps had no update.

        The weights are not set here: they are loaded into the model before the engine is built.
        """
        for state, tensors in states.items():
            for name, parameter in self._parameters.items():
                value = tensors[name].to(self.device, torch.float32)
                if self.zero_stage == 3:
                    # The setter of full tensors fails where a size is not divisible by the ranks: pad, set our part.
                    size = parameter.ds_tensor.numel()
                    padded = F.pad(value.flatten(), (0, size * self.ranks.count - value.numel()))
                    part = padded.narrow(0, size * self.ranks.rank, size)
                    safe_set_local_optimizer_state(parameter, part, state)
                else:
                    safe_set_full_optimizer_state(parameter, value, state)
        for partition in self._flat_partitions():
            self._inner.state[partition]["step"].fill_(float(steps_done - skipped))
        self._skipped_before = skipped

    @property
    def state_names(self) -> tuple[str, ...]:
        """Optimizer states that `full_state` takes: exp_avg, exp_avg_sq and, with an EMA, ema."""
        return self._inner.state_names

    @property
    def skipped_steps(self) -> int:
        """Steps of the run so far without an update, because a gradient was not finite."""
        return self._skipped_before + self.engine.skipped_steps

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in self._parameters.values())

    def _flat_partitions(self) -> list[torch.Tensor]:
        if self.zero_stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return self.optimizer.single_partition_of_fp32_groups
