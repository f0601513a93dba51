"""Bytes of one rank, by part, at the moments of a step that are its peaks: forward, backward, reduction, update.

What lives outside the net is what DeepSpeed 0.19.8 and AdamWithEma allocate at each ZeRO stage, in fp32; what lives in
it comes from a trace, gradient by gradient. tests/bench/bench_plan.py compares the sum with real ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.planning.trace import Traced
from pipeline.training.recipe import REDUCE_BUCKET_ELEMENTS

FP32 = 4
_PERSISTENT_ELEMENTS = 100_000  # ZeRO-3 keeps smaller parameters whole on every rank (DeepSpeed's default)
_PREFETCH_ELEMENTS = 50_000_000  # ZeRO-3 gathers so many ahead (DeepSpeed's default)
_ALL_REDUCE_ELEMENTS = 500_000_000  # ZeRO-0 flattens so many at a time (DeepSpeed's default)
PARTS = (
    *("weights", "fp32 copy of a part", "moments", "EMA", "gradients", "DeepSpeed's buckets", "gathered weights"),
    *("autocast's casts", "kept for backward", "computed meanwhile", "images", "update's temporaries"),
)


@dataclass(frozen=True)
class Layout:
    """What decides a rank's memory beside the net: `groups` are the elements of AdamW's parameter groups."""

    parameters: tuple[int, ...]
    groups: tuple[int, ...]
    ranks: int
    zero_stage: int
    accumulation: int
    ema: bool
    fused_loops: bool  # AdamW goes through all parameters of a group at once, as torch does on a GPU

    @property
    def elements(self) -> int:
        return sum(self.parameters)

    def part(self, elements: int) -> int:
        """Elements of `elements` that one rank has."""
        return math.ceil(elements / self.ranks)

    @property
    def persistent(self) -> int:
        """Elements that ZeRO-3 does not share out."""
        return sum(each for each in self.parameters if each <= _PERSISTENT_ELEMENTS)


@dataclass(frozen=True)
class Peak:
    """A moment of the step and what is alive in it, bytes by part."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def held(layout: Layout) -> dict[str, int]:
    """Bytes that are alive between two steps."""
    whole, part = FP32 * layout.elements, FP32 * layout.part(layout.elements)
    stage = layout.zero_stage
    states = whole if stage == 0 else part
    found = {"weights": whole, "moments": 2 * states, "EMA": states if layout.ema else 0}
    if stage:
        found["fp32 copy of a part"] = part
    if stage == 3:
        found["weights"] = part + FP32 * layout.persistent
        found["gradients"] = part
        found["DeepSpeed's buckets"] = FP32 * REDUCE_BUCKET_ELEMENTS
    return found


def peaks(layout: Layout, traced: Traced, cast_bytes: int, image_bytes: int) -> list[Peak]:
    """The moments of a step. `cast_bytes`: of the kept ones, what autocast has made of weights; `image_bytes`: of the
    micro-batch on the device.
    """
    before = held(layout)
    before["images"] = image_bytes
    forward, backward = (each(layout, traced, cast_bytes, before) for each in (_forward, _backward))
    return [forward, backward, *_update(layout, before)]


def peak(layout: Layout, traced: Traced, cast_bytes: int, image_bytes: int) -> Peak:
    """The highest of `peaks`."""
    return max(peaks(layout, traced, cast_bytes, image_bytes), key=lambda each: each.total)


def _plus(before: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    total = {name: before.get(name, 0) + more.get(name, 0) for name in PARTS}
    return {name: size for name, size in total.items() if size}


def _activations(traced: Traced, alive: int, cast_bytes: int) -> dict[str, int]:
    """`alive` bytes of the net by what they are; less are kept late in backward than forward has left."""
    kept = min(alive, traced.saved)
    casts = min(cast_bytes, kept)
    return {"autocast's casts": casts, "kept for backward": kept - casts, "computed meanwhile": alive - kept}


def _standing_gradients(layout: Layout) -> int:
    """Bytes of gradients that forward meets, from the micro-batch before."""
    if layout.accumulation == 1 or layout.zero_stage == 3:
        return 0
    return FP32 * (layout.elements if layout.zero_stage < 2 else layout.part(layout.elements))


def _forward(layout: Layout, traced: Traced, cast_bytes: int, before: dict[str, int]) -> Peak:
    more = _activations(traced, traced.forward_peak, cast_bytes)
    more["gradients"] = _standing_gradients(layout)
    if layout.zero_stage == 3:  # all stay until backward; the last gathered stand in the buffer that they came in, too
        gathered = layout.elements - layout.persistent
        more["gathered weights"] = FP32 * (gathered + min(gathered, _PREFETCH_ELEMENTS))
    return Peak("forward", _plus(before, more))


def _backward(layout: Layout, traced: Traced, cast_bytes: int, before: dict[str, int]) -> Peak:
    """The highest of backward's moments: gradients grow, or go through a bucket, while activations go."""
    stage, standing = layout.zero_stage, _standing_gradients(layout)
    bucket = FP32 * REDUCE_BUCKET_ELEMENTS if stage in (1, 2) else 0
    limit = FP32 * REDUCE_BUCKET_ELEMENTS
    own = FP32 * layout.part(layout.elements)
    best: dict[str, int] = {}
    done = waiting = reduced = 0  # bytes of gradients: that are there, in the bucket, that have left it
    for moment in traced.backward:
        size = FP32 * moment.elements
        steps = [{"alive": moment.peak, "buckets": bucket}]
        full = stage >= 2 and waiting + size > limit
        if full:  # the bucket is copied flat, and sent
            steps.append({"alive": moment.after, "buckets": bucket + waiting})
        for step in steps:
            if stage < 2:
                gradients = standing if standing else done
            else:
                gradients = standing + (own if stage == 2 and reduced else 0)
            more = _activations(traced, step["alive"], cast_bytes)
            more |= {"gradients": gradients, "DeepSpeed's buckets": step["buckets"]}
            if stage == 3:
                more["gathered weights"] = max(0, FP32 * (layout.elements - layout.persistent) - done)
            parts = _plus(before, more)
            if sum(parts.values()) > sum(best.values()):
                best = parts
        if full:  # only then is what is this rank's own taken out of it
            reduced, waiting = reduced + waiting, 0
        done, waiting = done + size, waiting + size
    return Peak("backward", best)


def _update(layout: Layout, before: dict[str, int]) -> list[Peak]:
    """The reduction after backward, and AdamW."""
    whole, part = FP32 * layout.elements, FP32 * layout.part(layout.elements)
    bucket = FP32 * REDUCE_BUCKET_ELEMENTS
    flat, stage = min(whole, bucket), layout.zero_stage
    largest_group = FP32 * max(layout.groups)
    if stage == 0:
        copies = min(whole, FP32 * _ALL_REDUCE_ELEMENTS)
        loops = largest_group if layout.fused_loops else 2 * FP32 * max(layout.parameters)
        return [
            Peak("reduction", _plus(before, {"gradients": whole, "DeepSpeed's buckets": copies})),
            Peak("update", _plus(before, {"gradients": whole, "update's temporaries": loops})),
        ]
    group = math.ceil(largest_group / layout.ranks)
    loops = group if layout.fused_loops else 2 * group
    # A group's gradients are copied flat, then freed; at stage 3 they stay in the buffer that is theirs.
    copied = {"gradients": group + (part if stage < 3 else 0)}
    found = [
        Peak("update", _plus(before, copied)),
        Peak("update", _plus(before, {"gradients": group, "update's temporaries": loops})),
    ]
    if stage == 1:
        found.append(
            Peak("reduction", _plus(before, {"gradients": whole - flat, "DeepSpeed's buckets": bucket + flat}))
        )
        if whole > flat:
            left = {"gradients": whole - flat + part, "DeepSpeed's buckets": bucket + min(flat, whole - flat)}
            found.append(Peak("reduction", _plus(before, left)))
    elif stage == 2:
        gradients = _standing_gradients(layout) + (part if whole > flat else 0)
        last = whole % bucket if whole > flat else whole
        found.append(Peak("reduction", _plus(before, {"gradients": gradients, "DeepSpeed's buckets": bucket + last})))
    return found


def total_by_part(peak_: Peak, fixed: int) -> Sequence[tuple[str, int]]:
    """(part, bytes) in the order of `PARTS`, and what is assumed outside of torch's tensors."""
    return [*peak_.parts.items(), ("CUDA, NCCL and slack (assumed)", fixed)]
