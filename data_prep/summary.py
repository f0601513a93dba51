"""What a build is told to the user at its end."""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_prep.output import REJECTED_NAME, BuildResult

LISTED_REJECTS = 5


def print_summary(result: BuildResult, output: Path, already_built: bool) -> None:
    """Print a table of the splits, the rejected images by reason, and notes, to standard output."""
    console = Console(soft_wrap=True, highlight=False)
    manifest = result.manifest
    state = "already built" if already_built else "built"
    table = Table(
        title=f"{state}: {manifest.name}, {manifest.num_classes} classes (id {manifest.dataset_id[:12]}), in {output}",
        title_justify="left",
    )
    for column in ("split", "samples", "per class", "shards", "MB", "MB in .beton", "rejected"):
        table.add_column(column, justify="left" if column == "split" else "right", no_wrap=True)
    for name, split in manifest.splits.items():
        counts = split.class_counts
        table.add_row(
            name,
            f"{split.samples:,}",
            f"{min(counts)}-{max(counts)}",
            str(len(split.shards)),
            f"{sum(entry.bytes for entry in split.shards) / 1e6:,.1f}",
            f"{sum(entry.bytes for entry in split.betons) / 1e6:,.1f}" if split.betons else "-",
            str(sum(row["split"] == name for row in result.rejected)),
        )
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", markup=False)
    if result.rejected:
        console.print(f"rejected images, all listed in {output / REJECTED_NAME}:", markup=False)
        reasons = Counter(row["reason"] for row in result.rejected).most_common()
        for reason, count in reasons[:LISTED_REJECTS]:
            example = next(row for row in result.rejected if row["reason"] == reason)
            console.print(f"  {count} x {reason} (such as {example['wnid']} {example['name']})", markup=False)
        if len(reasons) > LISTED_REJECTS:
            console.print(f"  and {len(reasons) - LISTED_REJECTS} other reasons", markup=False)
