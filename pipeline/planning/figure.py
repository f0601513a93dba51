"""A plan's two pictures in a file: memory by part for each policy's run, cost over GPUs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from data_prep.storage import atomic_write
from pipeline.config.sections import ConfigError
from pipeline.planning.memory import total_by_part
from pipeline.planning.plan import Plan
from pipeline.planning.rates import GIB

FORMATS = (".png", ".svg")


def check_path(path: Path) -> None:
    """Raises ConfigError where no picture can be written there, before anything is traced."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path}: its name has to end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}: make it first")


def draw(plan: Plan, path: Path) -> None:
    """Write the picture. Raises OSError."""
    from matplotlib.figure import Figure  # not pyplot, which asks for a screen

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    memory, cost = figure.subplots(1, 2)
    _draw_memory(plan, memory)
    _draw_cost(plan, cost)
    figure.suptitle(f"{plan.config.name}, {plan.asked.gpus} x {plan.asked.gpu.kind}: predicted")
    written = io.BytesIO()
    figure.savefig(written, format=path.suffix[1:].lower(), dpi=150)
    with atomic_write(path) as file:
        file.write(written.getvalue())


def _draw_memory(plan: Plan, axes: Any) -> None:
    parts = total_by_part(plan.peak, plan.fixed_bytes)
    names, sizes = [name for name, _ in parts], [size / GIB for _, size in parts]
    axes.barh(names, sizes, color="tab:blue")
    axes.invert_yaxis()
    total = sum(sizes)
    axes.set_title(f"memory in {plan.peak.moment}: {total:.1f} of {plan.asked.gpu.memory / GIB:.1f} GiB", fontsize=10)
    axes.set_xlabel("GiB")


def _draw_cost(plan: Plan, axes: Any) -> None:
    rows = [row for row in plan.scales if not row.refused]
    gpus = [row.gpus for row in rows]
    unit = "cost" if plan.asked.price else "GPU-hours"
    factors = [1.0 if plan.asked.price else row.gpus for row in rows]
    spent = [row.cost if plan.asked.price else row.hours for row in rows]
    low = [each.high * factor for each, factor in zip(spent, factors, strict=True)]
    high = [each.low * factor for each, factor in zip(spent, factors, strict=True)]
    axes.fill_between(gpus, low, high, alpha=0.3, color="tab:blue")
    axes.plot(gpus, high, marker="o", color="tab:blue", label="slow end")
    axes.plot(gpus, low, marker="o", color="tab:blue", linestyle="--", label="fast end")
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [str(each) for each in gpus])
    axes.set_ylim(bottom=0)
    axes.set_title(f"{unit} over GPUs, at {plan.asked.price:g} a GPU-hour", fontsize=10)
    axes.set_xlabel("GPUs")
    axes.legend()
