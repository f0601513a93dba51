"""A plan as tables and bars for the terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from pipeline.planning.memory import total_by_part
from pipeline.planning.plan import Plan, ScaleRow
from pipeline.planning.rates import GB, GIB
from pipeline.planning.speed import Range

_BAR = 30  # characters


def print_plan(plan: Plan, console: Console) -> None:
    """All tables, the assumptions last."""
    for part in (_summary(plan), _memory(plan), _policies(plan), _sending(plan), _scales(plan), _loader(plan)):
        console.print(part)
    console.print(_assumptions(plan))


def as_json(plan: Plan) -> dict[str, Any]:
    """Every number of the plan; bytes, seconds, hours."""
    row, asked = plan.row, plan.asked
    return {
        "predicted": True,
        "name": plan.config.name,
        "gpu": asked.gpu.kind,
        "gpus": asked.gpus,
        "precision": "bf16" if plan.bf16 else "fp32",
        "parameters": plan.parameters,
        "data": dataclasses.asdict(plan.data),
        "steps": plan.steps,
        "memory": {
            "moment": plan.peak.moment,
            "parts": plan.peak.parts | {"assumed": plan.fixed_bytes},
            "total": plan.peak.total + plan.fixed_bytes,
            "gpu": asked.gpu.memory,
            "fits": plan.peak.total + plan.fixed_bytes <= asked.gpu.memory,
            "moments": _highest(plan),
        },
        "policies": [dataclasses.asdict(each) for each in plan.policies],
        "run": _row_json(row),
        "scaling": [_row_json(each) for each in plan.scales],
        "stops_scaling": plan.stops_at,
        "zero_stages": {
            str(stage): {"sent_bytes": moved.sent(asked.gpus), **dataclasses.asdict(link), "states_bytes": states}
            for stage, (moved, link, states) in plan.by_stage.items()
        },
        "loader_per_node": dataclasses.asdict(plan.loader),
        "assumptions": list(plan.assumptions),
    }


def _highest(plan: Plan) -> dict[str, int]:
    """Most bytes of torch's tensors in each part of a step."""
    found: dict[str, int] = {}
    for each in plan.moments:
        found[each.moment] = max(found.get(each.moment, 0), each.total)
    return found


def _row_json(row: ScaleRow) -> dict[str, Any]:
    if row.refused:
        return {"gpus": row.gpus, "refused": row.refused}
    found = dataclasses.asdict(row) | {"sent_bytes": row.volume.sent(row.gpus)}
    del found["refused"], found["volume"]
    return found


def _summary(plan: Plan) -> RenderableType:
    config, asked, row, data = plan.config, plan.asked, plan.row, plan.data
    precision = "bf16" if plan.bf16 else "fp32"
    table = Table(title=f"{config.name} on {asked.gpus} x {asked.gpu.kind} (predicted)", show_header=False)
    table.add_row("model", f"{config.model.name}, {plan.parameters / 1e6:,.1f} M parameters, {precision}")
    table.add_row("images", f"{data.count:,} of {data.classes:,} classes; {data.known_by}")
    batch = f"{config.train.global_batch:,} = {asked.gpus} x {row.micro_batch} x {row.accumulation} accumulated"
    table.add_row("steps", f"{plan.steps:,}: {config.train.epochs} epochs; global batch {batch}")
    table.add_row("images/s", _range(row.images_per_second, "{:,.0f}"))
    table.add_row("MFU", _range(row.mfu * 100, "{:.0f}") + " %")
    table.add_row("a step takes", _range(Range(row.step_seconds.high, row.step_seconds.low), "{:.3g}") + " s")
    table.add_row("hours", _range(_turned(row.hours), "{:,.3g}"))
    table.add_row("GPU-hours", _range(_turned(row.hours) * asked.gpus, "{:,.3g}"))
    table.add_row("cost", _range(_turned(row.cost), "{:,.3g}") + f" at {asked.price:g} a GPU-hour")
    return table


def _memory(plan: Plan) -> RenderableType:
    total, memory = plan.peak.total + plan.fixed_bytes, plan.asked.gpu.memory
    verdict = "fits" if total <= memory else "DOES NOT FIT"
    title = f"memory of a GPU, highest in {plan.peak.moment}: {total / GIB:.1f} of {memory / GIB:.1f} GiB: {verdict}"
    table = Table(title=title)
    for heading in ("part", "GiB"):
        table.add_column(heading, justify="right" if heading == "GiB" else "left")
    table.add_column("")
    for part, size in total_by_part(plan.peak, plan.fixed_bytes):
        table.add_row(part, f"{size / GIB:.2f}", _bar(size / max(total, memory)))
    others = ", ".join(f"{name} {size / GIB:.1f}" for name, size in _highest(plan).items() if name != plan.peak.moment)
    return Group(table, f"torch's tensors in the other moments, GiB: {others}")


def _policies(plan: Plan) -> RenderableType:
    title = f"model.checkpointing at {plan.side} px, micro-batch {plan.config.train.micro_batch}"
    table = Table(title=title)
    for heading in ("policy", "kept, MB an image", "GiB a GPU", "fits", "largest micro-batch", "that divides"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for row in plan.policies:
        largest = (str(row.largest_micro_batch or "none"), str(row.largest_that_divides or "none"))
        cells = (f"{row.kept_per_image / 1e6:,.1f}", f"{row.peak / GIB:.1f}", "yes" if row.fits else "NO", *largest)
        table.add_row(row.name, *cells)
    return table


def _sending(plan: Plan) -> RenderableType:
    asked = plan.asked
    if asked.gpus == 1:
        return "one GPU: nothing is sent"
    title = f"what a GPU sends in a step, on {asked.gpus} GPUs (train.zero_stage is {plan.config.train.zero_stage})"
    table = Table(title=title)
    for heading in ("ZeRO stage", "GB", "ring, ms", "tree, ms", "slowest link", "states, GiB a GPU"):
        table.add_column(heading, justify="left" if heading == "slowest link" else "right")
    for stage, (moved, link, states) in plan.by_stage.items():
        milliseconds = (f"{1e3 * link.ring:.1f}", f"{1e3 * link.tree:.1f}")
        table.add_row(str(stage), f"{moved.sent(asked.gpus) / GB:.2f}", *milliseconds, link.link, f"{states / GIB:.2f}")
    return table


def _scales(plan: Plan) -> RenderableType:
    table = Table(title=f"more GPUs, the same global batch of {plan.config.train.global_batch:,}")
    for heading in ("GPUs", "micro x acc.", "images/s", "MFU, %", "efficiency, %", "sending, ms", "hours", "cost", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_column("held up by")
    most = max((row.cost.low for row in plan.scales if not row.refused), default=1.0)
    for row in plan.scales:
        if row.refused:
            table.add_row(str(row.gpus), *(["-"] * 7), "", row.refused)
            continue
        table.add_row(
            *(str(row.gpus), f"{row.micro_batch} x {row.accumulation}", _range(row.images_per_second, "{:,.0f}")),
            *(_range(row.mfu * 100, "{:.0f}"), _range(row.efficiency * 100, "{:.0f}"), f"{1e3 * row.link.best:.1f}"),
            *(_range(_turned(row.hours), "{:,.3g}"), _range(_turned(row.cost), "{:,.3g}")),
            *(_bar(row.cost.low / most, 8) if most else "", row.held_up_by),
        )
    return Group(table, f"stops scaling (below 80 %): {plan.stops_at}")


def _loader(plan: Plan) -> RenderableType:
    need, asked = plan.loader, plan.asked
    table = Table(title="what the loader of a node has to give, at the fast end", show_header=False)
    gpus = min(asked.gpus, asked.per_node)
    table.add_row("images/s", f"{need.images_per_second:,.0f} ({gpus} GPUs)")
    table.add_row("cores", f"{need.cores:.1f}")
    size = f"{plan.data.bytes_each / 1e3:.0f} kB an image"
    table.add_row("disk", f"{need.disk_bytes_per_second / 1e6:,.0f} MB/s ({size})")
    network = f"{need.network_bytes_per_second / 1e6:,.0f} MB/s" if need.network_bytes_per_second else "none"
    table.add_row("network", f"{network}; as the disk, where the folder is shared")
    return table


def _assumptions(plan: Plan) -> str:
    return "\n".join(["assumed", *(f"- {each}" for each in plan.assumptions)])


def _turned(found: Range) -> Range:
    """Least first, of what is less at the fast end."""
    return Range(found.high, found.low)


def _range(found: Range, form: str) -> str:
    if math.isnan(found.low):
        return "-"
    low, high = (_plain(form, each) for each in (found.low, found.high))
    return low if low == high else f"{low} to {high}"


def _plain(form: str, value: float) -> str:
    """Three figures, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else form.format(value)


def _bar(share: float, width: int = _BAR) -> str:
    return "█" * max(0, min(width, round(share * width)))
