"""The comparison of runs in the terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.review.differences import differences
from pipeline.review.run import Run

_KEYS = 40


def print_comparison(runs: list[Run]) -> None:
    """Print a table of the runs, and one of what differs between their configurations."""
    console = Console(width=None if Console().is_terminal else 140)
    table = Table(title=f"{len(runs)} run{'s' if len(runs) > 1 else ''}")
    table.add_column("run", overflow="fold")
    for name in ("stage", "state"):
        table.add_column(name)
    for name in ("step", "loss", "top-1", "best", "images/s", "data wait", "hours", "faults"):
        table.add_column(name, justify="right")
    for run in runs:
        steps = f"{run.step:,} / {run.steps:,}" if run.steps else f"{run.step:,}"
        cells = [run.name, run.stage, run.state, steps, number(run.last.get("loss"), ".4f")]
        cells += [number(run.last.get("top1"), ".2f"), number(run.best_top1, ".2f")]
        cells += [number(run.images_per_second, ",.0f"), number(data_share(run), ".0%"), hours(run), faults(run)]
        table.add_row(*map(escape, cells))
    console.print(table)
    found = differences([run.config for run in runs])
    if len(runs) < 2:
        return
    if not found:
        console.print("their configurations are the same, but for the names")
        return
    table = Table(title="what differs between their configurations")
    table.add_column("key")
    for run in runs:
        table.add_column(escape(run.name), overflow="fold")
    for key, values in list(found.items())[:_KEYS]:
        table.add_row(escape(key), *map(escape, values))
    console.print(table)
    if len(found) > _KEYS:
        console.print(f"and {len(found) - _KEYS} more keys: the page has all")


def number(value: float | None, form: str) -> str:
    """A metric as text: "-" for one that there is none of, "nan" and "inf" as they are."""
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else str(value)


def data_share(run: Run) -> float | None:
    """The share of training that was waited for data."""
    spent = run.timeline.spent
    return spent.data / (spent.training + spent.data) if spent.training + spent.data > 0 else None


def hours(run: Run) -> str:
    """Of running, stops left out."""
    return number(float(run.timeline.hours[-1]), ".2f") if len(run.timeline.hours) else "-"


def faults(run: Run) -> str:
    """What should be nothing in a good run, in words."""
    names = (("bad_samples", "bad images"), ("skipped_steps", "skipped"), ("rewinds", "rewinds"))
    told = [(run.last.get(key, 0.0), name) for key, name in (*names, ("checkpoints_failed", "unsaved"))]
    told.append((run.event_count("not-finite"), "not finite"))
    return ", ".join(f"{count:.0f} {name}" for count, name in told if count) or "-"
