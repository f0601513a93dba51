"""The `labels` command: what the classes of one label space are in another, as a table and as an index map."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.labels.spaces import KNOWN_SPACES, TEDDY_BEAR, LabelMap, label_space, lemma, map_labels
from data_prep.storage import atomic_write, user_path

SHOWN_ONLY_A = 10
SHOWN_ONLY_B = 50  # those matter more: they are what a map leaves out

DESCRIPTION = """\
Print how the classes of B map into A, by WordNet id: which number each class of B has in A, and which it has not.
Each of A and B is
  a known label space (`labels --list` shows them),
  a data set folder, local or URL: the classes of its dataset.json,
  a text file with one WordNet id per line, in class order."""

TEDDY_SENTENCE = """\
{wnid} (teddy bear) of ImageNet-1K is not in {a}. The fall 2011 release of ImageNet-22K lacks it; two well-known
repositories map it to another class (Swin Transformer's map22kto1k.txt to n03013580: chemise, slip, teddy). Here it
is -1: it is never pointed elsewhere."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `labels`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "a",
        nargs="?",
        type=user_path,
        metavar="A",
        help="the space that is mapped into, such as that of a checkpoint's head",
    )
    add("b", nargs="?", type=user_path, metavar="B", help="the space whose classes are looked up in A")
    add(
        "--output",
        type=user_path,
        metavar="MAP.json",
        help="write the index map: for each class of B its number in A or -1",
    )
    add("--all", action="store_true", help="list every class that only one of them has, not only the first")
    add("--list", action="store_true", help="list the known label spaces (also without A and B)")


def run(args: argparse.Namespace) -> int:
    """Print the comparison or the list of known spaces; 2 where A is given without B."""
    console = Console(soft_wrap=True, highlight=False)
    if args.list or args.a is None:
        _print_spaces(console)
        return 0
    if args.b is None:
        Console(stderr=True).print("error: give two label spaces to compare, or none to list those known", markup=False)
        return 2
    a, b = label_space(args.a), label_space(args.b)
    mapped = map_labels(a, b)
    _print_comparison(console, args, a, b, mapped)
    if args.output is not None:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.output) as file:
            file.write((json.dumps(index_map(args.a, args.b, a, b, mapped), indent=1) + "\n").encode())
        console.print(f"index map written to {args.output}", markup=False)
    return 0


def index_map(name_a: str, name_b: str, a: list[str], b: list[str], mapped: LabelMap) -> dict[str, Any]:
    """What --output holds: source_index[i] is the class number in A of class i of B, whose id is synsets[i]."""
    return {
        "a": name_a,
        "b": name_b,
        "sizes": {"a": len(a), "b": len(b)},
        "synsets": b,
        "source_index": mapped.source_index.tolist(),
        "unmatched": [{"wnid": wnid, "lemma": lemma(wnid)} for wnid in mapped.unmatched],
    }


def _print_spaces(console: Console) -> None:
    table = Table(title="known label spaces, in order of WordNet id unless told otherwise", title_justify="left")
    for column in ("name", "classes", "what it is"):
        table.add_column(column, justify="right" if column == "classes" else "left", no_wrap=column != "what it is")
    for name, space in KNOWN_SPACES.items():
        table.add_row(name, f"{space.classes:,}", space.what)
    console.print(table)
    console.print("also: a data set folder (its dataset.json), or a text file with one WordNet id per line")


def _print_comparison(console: Console, args: argparse.Namespace, a: list[str], b: list[str], mapped: LabelMap) -> None:
    known = set(b)
    only_a = [wnid for wnid in a if wnid not in known]
    table = Table(title=f"classes of {args.b} in {args.a}", title_justify="left")
    for column in ("", "classes", "in both", "only here"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, space, only in ((f"A: {args.a}", a, only_a), (f"B: {args.b}", b, mapped.unmatched)):
        table.add_row(name, f"{len(space):,}", f"{len(mapped.matched):,}", f"{len(only):,}")
    console.print(table)
    shown_b, shown_a = (None, None) if args.all else (SHOWN_ONLY_B, SHOWN_ONLY_A)
    _print_classes(console, f"only in B ({args.b}), -1 in the index map", mapped.unmatched, shown_b)
    _print_classes(console, f"only in A ({args.a})", only_a, shown_a)
    if args.b == "imagenet-1k" and TEDDY_BEAR in mapped.unmatched:
        console.print(TEDDY_SENTENCE.format(wnid=TEDDY_BEAR, a=args.a).replace("\n", " "), markup=False)
    found = mapped.source_index[mapped.source_index >= 0]
    where = f"numbers {found.min()} to {found.max()} of A" if found.size else "no class of A"
    console.print(f"index map: {len(b):,} classes of B -> {where}; -1 for {len(mapped.unmatched):,}", markup=False)


def _print_classes(console: Console, title: str, wnids: list[str], shown: int | None) -> None:
    if not wnids:
        return
    console.print(f"{title}: {len(wnids):,}", markup=False)
    for wnid in wnids[:shown]:
        console.print(f"  {wnid} {lemma(wnid)}", markup=False)
    if shown is not None and len(wnids) > shown:
        console.print(f"  and {len(wnids) - shown:,} more (--all lists them)", markup=False)
