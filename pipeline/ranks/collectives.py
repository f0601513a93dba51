"""This process among all ranks, and what ranks say to each other outside DeepSpeed: plain collectives over the process
group that the engine started.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.ranks.ports import any_free_port


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `count`."""

    rank: int = 0
    count: int = 1


def own_threads(local: int) -> int:
    """This rank's share of the host's cores, among `local` ranks: never more threads than OMP_THREAD_LIMIT allows.

    Where OpenMP gives fewer threads than torch (2.13, 2.15) asked for, the weight gradients of convolutions are wrong,
    without an error: findings/torch_omp_thread_limit.sh.
    """
    threads, limit = len(os.sched_getaffinity(0)) // local, os.environ.get("OMP_THREAD_LIMIT", "")
    return max(1, min(threads, int(limit)) if limit.isdigit() else threads)


def local_ranks(otherwise: int) -> int:
    """How many ranks share this host, as its launcher tells: torchrun and ours, or DeepSpeed (0.19.8)."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if (text := os.environ.get(name, "")).isdigit() and int(text):
            return int(text)
    return otherwise


def be_alone_without_launcher() -> None:
    """Where no launcher has described a process group, describe one of a single rank."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(any_free_port())}


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


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The largest of `values` over all ranks, element by element, on all of them."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather(value: Any) -> list[Any]:
    """Every rank's `value` (any picklable object), by rank, on all of them."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
