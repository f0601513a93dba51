"""What ranks send each other in a step, and how long links take for it.

Volumes are those of DeepSpeed 0.19.8, which all-reduces gradients at stages 1 and 2 too, and keeps of them what is its
own (`use_multi_rank_bucket_allreduce`): with the weights that are gathered after the update, half as much again as at
stage 0. tests/pipeline/planning/test_memory.py counts what two real ranks give to their collectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.planning.memory import FP32
from pipeline.planning.rates import GB, Gpu, GpuRates
from pipeline.training.recipe import REDUCE_BUCKET_ELEMENTS

# Assumed: shares of a data sheet that NCCL's large messages reach (some 370 of the 450 GB/s of an H100's NVLink);
# and seconds a hop.
_NODE_SHARE, _NETWORK_SHARE = 0.8, 0.9
_NODE_HOP, _NETWORK_HOP = 3e-6, 10e-6


@dataclass(frozen=True)
class Volume:
    """Bytes that a rank's collectives are about in one optimizer step, and how many collectives they are."""

    all_reduce: int
    all_gather: int
    reduce_scatter: int
    calls: int

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends, by a ring: an all-reduce passes twice, the others once."""
        return (ranks - 1) / ranks * (2 * self.all_reduce + self.all_gather + self.reduce_scatter)


def volume(elements: int, zero_stage: int, accumulation: int, ranks: int) -> Volume:
    """Of a net of `elements` parameters, whose gradients and weights travel in fp32."""
    if ranks == 1:
        return Volume(0, 0, 0, 0)
    whole = FP32 * elements
    buckets = math.ceil(elements / REDUCE_BUCKET_ELEMENTS)
    if zero_stage == 0:
        return Volume(whole, 0, 0, math.ceil(elements / 500_000_000))
    if zero_stage == 1:
        return Volume(whole, whole, 0, 2 * buckets)
    if zero_stage == 2:  # each micro-batch's gradients by themselves
        return Volume(whole * accumulation, whole, 0, buckets * (accumulation + 1))
    # Weights for forward, which stay for backward whatever the checkpointing.
    return Volume(0, whole * accumulation, whole * accumulation, 4 * buckets * accumulation)


@dataclass(frozen=True)
class Times:
    """Seconds a step, were nothing else to do: by the ring and by the tree; `link`: which of them is the slower."""

    ring: float
    tree: float
    link: str

    @property
    def best(self) -> float:
        """NCCL takes the faster."""
        return min(self.ring, self.tree)


def times(moved: Volume, ranks: int, gpu: Gpu, per_node: int, link_rate: float, rates: GpuRates | None = None) -> Times:
    """Times of `moved` on `ranks` GPUs, `per_node` in a node; `link_rate`: bytes/s between nodes, a GPU."""
    if ranks == 1:
        return Times(0.0, 0.0, "none")
    nodes, inside = math.ceil(ranks / per_node), min(ranks, per_node)
    node_rate = gpu.node_rate * _NODE_SHARE
    # A ring through all nodes enters and leaves each of them once for each of its ports: together they are one pipe.
    network_rate = link_rate * inside * _NETWORK_SHARE
    slower = node_rate if nodes == 1 else min(node_rate, network_rate)
    link = "inside the node" if slower == node_rate else "between nodes"
    known = (rates.all_reduce_gbs if rates else {}).get(ranks)
    if known is not None:
        slower, link = known * GB, f"{link} (measured)"
    hop = _NODE_HOP if nodes == 1 else _NETWORK_HOP
    ring_hops = moved.calls * (2 * nodes * hop + 2 * inside * _NODE_HOP) if nodes > 1 else moved.calls * 2 * ranks * hop
    tree_hops = moved.calls * 2 * (math.ceil(math.log2(nodes)) * _NETWORK_HOP + inside * _NODE_HOP)
    ring = moved.sent(ranks) / slower + ring_hops
    # A tree carries the whole twice, up and down; gathering and scattering go by the ring alone.
    gathered = (ranks - 1) / ranks * (moved.all_gather + moved.reduce_scatter)
    tree = (2 * moved.all_reduce + gathered) / slower + tree_hops
    return Times(ring, tree, link)
