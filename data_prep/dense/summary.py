"""What a dense build is told to the user at its end: the splits, and what became of images and annotations."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.dense.build import DenseResult
from data_prep.dense.ledger import ACTIONS, WHAT_IT_MEANS
from data_prep.ledger import LEDGER_NAME
from data_prep.storage import Folder

LISTED_REASONS = 30


def print_summary(result: DenseResult, output: Folder) -> None:
    """Print a table of the splits, one of actions and reasons from the ledger, and notes, to standard output."""
    console = Console(soft_wrap=True, highlight=False)
    manifest = result.manifest
    state = "already built" if result.already_built else "built"
    table = Table(
        title=f"{state}: {escape(manifest.name)}, {manifest.task}, {manifest.num_classes:,} classes (id "
        f"{manifest.dataset_id[:12]}), in {escape(output.url)}",
        title_justify="left",
    )
    of_class = "pixels" if manifest.task == "semantic" else "annotations"
    for column in ("split", "images", of_class, "classes without any", "shards", "MB"):
        table.add_column(column, justify="left" if column == "split" else "right", no_wrap=True)
    for name, split in manifest.splits.items():
        counts = split.class_pixels if manifest.task == "semantic" else split.class_annotations
        table.add_row(
            name,
            f"{split.samples:,}",
            f"{sum(counts):,}",
            f"{counts.count(0):,}",
            f"{len(split.shards):,}",
            f"{sum(entry.bytes for entry in split.shards) / 1e6:,.1f}",
        )
    console.print(table)
    listing = Table(title=f"as listed in {escape(output.join(LEDGER_NAME))}", title_justify="left")
    for column in ("split", "of", "action", "reason", "rows", ""):
        listing.add_column(column, justify="right" if column == "rows" else "left", no_wrap=bool(column))
    ordered = sorted(
        result.counts.items(), key=lambda pair: (pair[0][0], pair[0][1] != "image", ACTIONS.index(pair[0][2]), -pair[1])
    )
    for (split_name, of, action, reason), count in ordered[:LISTED_REASONS]:
        meaning = WHAT_IT_MEANS.get(reason.split("+")[0], "")
        listing.add_row(split_name, of, action, escape(reason), f"{count:,}", meaning)
    if len(ordered) > LISTED_REASONS:
        listing.add_row("", "", "", "and others", str(sum(count for _, count in ordered[LISTED_REASONS:])), "")
    console.print(listing)
    lost = sum(count for row, count in result.counts.items() if row[:3] == ("val", "image", "rejected"))
    if lost:
        console.print(
            f"note: {lost:,} images of val cannot be used: figures on the others are not those of the whole benchmark",
            markup=False,
        )
