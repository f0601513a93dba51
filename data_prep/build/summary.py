"""What a build is told to the user at its end: the splits, and what became of the images, by reason."""

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.build.output import BuildResult
from data_prep.ledger import ACTIONS, LEDGER_NAME
from data_prep.storage import Folder, open_binary

LISTED_REASONS = 25


def print_summary(result: BuildResult, output: Folder) -> None:
    """Print a table of the splits, one of actions and reasons from the ledger, and notes, to standard output."""
    console = Console(soft_wrap=True, highlight=False)
    manifest = result.manifest
    state = "already built" if result.already_built else "built"
    table = Table(
        title=f"{state}: {escape(manifest.name)}, {manifest.num_classes:,} classes (id {manifest.dataset_id[:12]}), "
        f"in {escape(output.url)}",
        title_justify="left",
    )
    for column in ("split", "samples", "per class", "shards", "MB", "MB in .beton"):
        table.add_column(column, justify="left" if column == "split" else "right", no_wrap=True)
    for name, split in manifest.splits.items():
        counts = split.class_counts
        table.add_row(
            name,
            f"{split.samples:,}",
            f"{min(counts)}-{max(counts)}",
            f"{len(split.shards):,}",
            f"{sum(entry.bytes for entry in split.shards) / 1e6:,.1f}",
            f"{sum(entry.bytes for entry in split.betons) / 1e6:,.1f}" if split.betons else "-",
        )
    console.print(table)
    print_ledger(console, output)
    for note in result.notes:
        console.print(f"note: {note}", markup=False)


def print_ledger(console: Console, output: Folder) -> None:
    """Print how many images had which action and reason, with an example of each."""
    if not output.exists(LEDGER_NAME):
        return
    counts: dict[tuple[str, str], int] = {}
    examples: dict[tuple[str, str], str] = {}
    with open_binary(output.join(LEDGER_NAME)) as file:
        for batch in pq.ParquetFile(file).iter_batches(columns=["action", "reason", "name"]):
            groups = pa.Table.from_batches([batch]).group_by(["action", "reason"])
            for row in groups.aggregate([("name", "count"), ("name", "min")]).to_pylist():
                key = (row["action"], row["reason"])
                counts[key] = counts.get(key, 0) + row["name_count"]
                examples.setdefault(key, row["name_min"])
    listing = Table(title=f"every image, as listed in {escape(output.join(LEDGER_NAME))}", title_justify="left")
    for column in ("action", "reason", "images", "such as"):
        listing.add_column(column, justify="right" if column == "images" else "left", no_wrap=column != "such as")
    ordered = sorted(counts, key=lambda key: (ACTIONS.index(key[0]), -counts[key], key[1]))
    for action, reason in ordered[:LISTED_REASONS]:
        listing.add_row(action, reason, f"{counts[action, reason]:,}", escape(examples[action, reason]))
    if len(ordered) > LISTED_REASONS:
        listing.add_row("", "and others", str(sum(counts[key] for key in ordered[LISTED_REASONS:])), "")
    console.print(listing)
