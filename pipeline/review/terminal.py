"""The comparison of runs in the terminal."""

from __future__ import annotations

import math

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from pipeline.review.differences import differences
from pipeline.review.run import Run, score_of

_KEYS = 40
_COLUMNS = ("run", "stage", "state", "step", "loss", "score", "best", "images/s", "data wait", "hours", "faults")
_WIDEST = 10_000
_LEAST_NAME = 12  # characters of a line of a run's name; numbers are never cut
_TEXTS = ("run", "stage", "state")
# In turn, where the terminal is narrow: all else is nearer to which run is better.
_LEFT_OUT = ("data wait", "hours", "images/s", "stage", "faults", "best", "state", "step")


def print_comparison(runs: list[Run]) -> None:
    """Print a table of the runs, and one of what differs between their configurations."""
    console = Console(width=None if Console().is_terminal else 140)
    left_out: tuple[str, ...] = ()
    while _width(table := _table(runs, left_out), console, runs) > console.width and len(left_out) < len(_LEFT_OUT):
        left_out = _LEFT_OUT[: len(left_out) + 1]
    console.print(table)
    if left_out:
        console.print(f"in a wider terminal, and on the page: {', '.join(left_out)}")
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


def _table(runs: list[Run], left_out: tuple[str, ...]) -> Table:
    table = Table(title=f"{len(runs)} run{'s' if len(runs) > 1 else ''}")
    shown = [name for name in _COLUMNS if name not in left_out]
    scores = {score_of(run.stage)[1] for run in runs}
    score = scores.pop() if len(scores) == 1 else ""
    for name in shown:  # a number that is cut is another number
        head = score if name == "score" and score else name
        table.add_column(head, overflow="fold", justify="left" if name in _TEXTS else "right", no_wrap=name != "run")
    for run in runs:
        cells = {
            "run": run.name,
            "stage": run.stage,
            "state": run.state,
            "step": f"{run.step:,} / {run.steps:,}" if run.steps else f"{run.step:,}",
            "loss": number(run.last.get("loss"), ".4f"),
            "score": _score(run, run.score, not score),
            "best": _score(run, run.best_score, not score),
            "images/s": number(run.images_per_second, ",.0f"),
            "data wait": number(data_share(run), ".0%"),
            "hours": hours(run),
            "faults": faults(run),
        }
        table.add_row(*(escape(cells[name]) for name in shown))
    return table


def _score(run: Run, percent: float | None, named: bool) -> str:
    name = f" {score_of(run.stage)[1]}" if named and percent is not None else ""
    return number(percent, ".2f") + name


def _width(table: Table, console: Console, runs: list[Run]) -> int:
    """Columns of the terminal that it takes at least: names may be folded, and nothing else."""
    longest = max(map(cell_len, (run.name for run in runs)), default=0)
    wide = Measurement.get(console, console.options.update_width(_WIDEST), table).maximum
    return wide - max(0, longest - _LEAST_NAME)


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
