"""What a person needs to see of a step that was left out: which samples, which micro-batch, where in the network.

Each rank looks again at the worst of its micro-batches and hands over a part; rank 0 makes of them one record for the
ledger and one line for the console. Nothing here is a collective or changes the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.config.run import RunConfig
from pipeline.data.augment import normalise
from pipeline.models.hornet import HorNet
from pipeline.ranks.collectives import Ranks
from pipeline.training.recipe import seed_micro_batch
from pipeline.training.task import Place, Task

_PARTS_KEPT = 8  # of hundreds of ranks: a fault of the data is in one or two, one of the weights looks alike in all
_SAMPLES_SHOWN = 4


@torch.no_grad()
def stage_statistics(model: nn.Module, inputs: Any, backbone: HorNet | None = None) -> list[dict[str, Any]]:
    """What leaves the gnConvs of each stage for the model's `inputs`, images (B, 3, H, W), normalised, or what its task
    has in their place; in the mode the model is in.

    `backbone`: the part of the model that has the stages; None: the model itself.

    A dict a stage: stage (from 1), rms and max_abs of its finite elements (nan without any), non_finite (the count of
    the others) and first_bad_block (from 0, None if all is finite). A fault in a block's MLP shows in the next block.
    Raises ValueError for sizes that the model does not take.
    """
    backbone = cast(HorNet, model) if backbone is None else backbone
    seen: list[list[tuple[float, float, int, int]]] = [[] for _ in backbone.stages]

    def look(stage: int) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, output: seen[stage].append(_moments(output))

    hooks = []
    try:
        for stage, blocks in enumerate(backbone.stages):
            hooks += [cast(nn.Module, block.gnconv).register_forward_hook(look(stage)) for block in blocks.children()]
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [_summary(number, blocks) for number, blocks in enumerate(seen, 1)]


def diagnose(
    config: RunConfig,
    task: Task,
    ranks: Ranks,
    step: int,
    micro_losses: list[float],
    model: nn.Module,
    place: Place,
    device: torch.device,
    bf16: bool,
) -> dict[str, Any]:
    """This rank's part of an incident at the run's step `step`: the worst of its micro-batches, read and run again.

    `micro_losses` are those of the step, in order; the worst is the first that is not finite, else the largest.
    `model` is a replica with the current weights; it is put into train mode, and on `device` for as long as it takes.
    `place` brings a batch to the device and augments it there, as in training. Views, drop path and precision are those
    of the step; images are not mixed, so a loss that only their mixture gave is not met again.

    Returns rank, micro_batch, loss, samples (ids), stages (of `stage_statistics`). Where the batch cannot be read or
    run again, stages is empty and `error` says why: looking closer must not end a run. Sets torch's random state.
    """
    accumulation = config.train.accumulation_steps(ranks.count)
    assert len(micro_losses) == accumulation, (len(micro_losses), accumulation)
    micro = max(range(accumulation), key=lambda i: (_badness(micro_losses[i]), -i))
    size = config.train.micro_batch
    planned = list(task.order.micro_batches(step, step + 1, ranks.rank, ranks.count, size))[micro]
    part = {"rank": ranks.rank, "micro_batch": micro, "loss": micro_losses[micro], "samples": planned.samples.tolist()}
    try:
        batches = task.again(step)
        with closing(batches):  # it ends its reader when it is closed
            batch = next(islice(batches, micro, None))
        part["samples"] = batch.samples.tolist()  # with those that stood in for bad ones
        inputs, _ = place(batch)
        if isinstance(inputs, Tensor) and inputs.dtype == torch.uint8:
            inputs = normalise(inputs)
        seed_micro_batch((config.seed, step, (ranks.rank * accumulation + micro) * size))  # drop path, as in the step
        model.to(device).train()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return {**part, "stages": stage_statistics(model, inputs, task.backbone(model))}
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: the device's memory has no room for it
        return {**part, "stages": [], "error": str(error).partition("\n")[0]}
    finally:
        model.to("cpu")


def incident(
    step: int, reason: str, loss: float, grad_norm: float, epoch: int, samples: Sequence[int], parts: list[dict]
) -> dict[str, Any]:
    """The ledger's record of a step that was left out for `reason`.

    `samples` are the ids of the whole global batch; `parts` what `diagnose` returned on the ranks, of which the worst 8
    are kept, worst first. Floats that are not finite become "nan", "inf" and "-inf": JSON has no such numbers.
    """
    worst_first = sorted(parts, key=lambda part: (-_badness(part["loss"]), part["rank"]))
    record = {
        "step": step,
        "epoch": epoch,
        "reason": reason,
        "loss": loss,
        "grad_norm": grad_norm,
        "samples": [int(sample) for sample in samples],
        "parts": worst_first[:_PARTS_KEPT],
    }
    return cast(dict[str, Any], _as_json(record))


def incident_line(record: dict[str, Any]) -> str:
    """One console line of what `incident` returned."""
    line = f"LEFT OUT: {record['reason']}"
    if not record["parts"]:
        return line
    worst = record["parts"][0]
    shown = ", ".join(map(str, worst["samples"][:_SAMPLES_SHOWN]))
    more = len(worst["samples"]) - _SAMPLES_SHOWN
    line += f"  worst: rank {worst['rank']} micro-batch {worst['micro_batch']}, samples {shown}"
    line += f" and {more} more" if more > 0 else ""
    if not worst["stages"]:
        return f"{line}  not looked into: {worst['error']}"
    for stage in worst["stages"]:
        if stage["non_finite"]:
            return f"{line}  not finite from stage {stage['stage']}, block {stage['first_bad_block']}"
    largest = max(worst["stages"], key=lambda stage: stage["max_abs"])
    return f"{line}  largest activation {largest['max_abs']:.3g} in stage {largest['stage']}"


def _moments(x: Tensor) -> tuple[float, float, int, int]:
    """(sum of squares, largest magnitude, count) of the finite elements of `x`, and the count of the others."""
    non_finite = x.numel() - int(x.isfinite().sum())
    if non_finite:
        x = x.nan_to_num(0.0, 0.0, 0.0)
    # In double, a copy that is gone at once: squares of 1e20 are not finite in float32.
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    return float(norm) ** 2, float(torch.linalg.vector_norm(x, math.inf)), x.numel() - non_finite, non_finite


def _summary(stage: int, blocks: list[tuple[float, float, int, int]]) -> dict[str, Any]:
    squares, largest, finite, non_finite = zip(*blocks, strict=True)
    any_finite = sum(finite) > 0
    return {
        "stage": stage,
        "rms": math.sqrt(sum(squares) / sum(finite)) if any_finite else math.nan,
        "max_abs": max(largest) if any_finite else math.nan,
        "non_finite": sum(non_finite),
        "first_bad_block": next((block for block, bad in enumerate(non_finite) if bad), None),
    }


def _badness(loss: float) -> float:
    """What orders losses: nan and both infinities come above all that is finite."""
    return loss if math.isfinite(loss) else math.inf


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_json(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
