"""The `index` command: makes a data set of WebDataset tars that somebody else wrote."""

import argparse
from pathlib import Path

from data_prep.foreign.index import Indexing, index_tars, refuse_present
from data_prep.foreign.scan import ForeignError
from data_prep.foreign.splits import DEFAULT_SPLITS
from data_prep.foreign.tar import Accepted
from data_prep.labels.spaces import label_space
from data_prep.manifest import dataset_folder
from data_prep.shards.upgrade import upgrade_dataset
from data_prep.storage import Folder, is_url, user_path

DESCRIPTION = """\
Make a data set of plain WebDataset tars: an index beside each, or in --index-folder, and dataset.json. The tars stay as
they are.

The class of a sample is that of the WordNet id (n01440764) in its .cls, its JSON ("wnid", "synset", "label" or
"filename"), or at the beginning of its key or folder; else the number in its .cls, or its JSON's "label": then
--classes has to say which class each number is. Links count as the files that they name. Every tar is read to its end
once; the same command goes on after an interruption."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `index`."""
    add = parser.add_argument
    add("data", type=user_path, metavar="DIR", help="folder of the tars, or its URL")
    add(
        "--index-folder",
        type=user_path,
        metavar="DIR",
        help="where the indexes and dataset.json go, for tars that lie where nothing can be written: give this folder "
        "as data.path (default: beside the tars)",
    )
    add(
        "--split",
        action="append",
        default=[],
        metavar="NAME=GLOB",
        help="tars of a split, such as val='val-{00..63}.tar', all of which have to be there; may be repeated "
        "(train='train*.tar', val='val*.tar')",
    )
    add(
        "--classes",
        type=user_path,
        metavar="SPACE",
        help="label space of class numbers, or the classes to take: a known name, a data set, or a text file of "
        "WordNet ids",
    )
    add(
        "--others",
        choices=("error", "skip"),
        default="error",
        help="samples of classes that are not in --classes: an error, or left out (default: %(default)s)",
    )
    add("--skip-unlabelled", action="store_true", help="leave out samples without an image or a class")
    add(
        "--unmarked",
        action="store_true",
        help="take tars that end without a tar's end mark for whole: some programs leave it out, but what was cut "
        "short between two files lacks it, too",
    )
    add("--force", action="store_true", help="write another dataset.json in place of one that this command wrote")
    add(
        "--upgrade",
        action="store_true",
        help="instead: give a data set that `shard` of a former version built what it lacks (KEY.cls in the shards, "
        "_info.json, lost indexes), in place and without encoding anything; no run may read it meanwhile",
    )


def run(args: argparse.Namespace) -> int:
    """Index, print what there is now."""
    folder = _folder(args.data)
    if args.upgrade:
        return _upgrade(args, folder)
    at = _folder(args.index_folder) if args.index_folder else folder
    refuse_present(at, args.force)
    splits: dict[str, list[str]] = {}
    for text in args.split:
        name, equals, pattern = text.partition("=")
        if not (name and equals and pattern):
            raise ForeignError(f"--split {text!r} is not of the form NAME=GLOB, such as train='part-*.tar'")
        splits.setdefault(name, []).append(pattern)
    if args.others == "skip" and not args.classes:
        raise ForeignError("--others skip needs the classes that are not skipped: add --classes, a text file of them")
    classes = label_space(args.classes) if args.classes else None
    accepted = Accepted(args.skip_unlabelled, args.unmarked)
    task = Indexing(folder, at, splits or DEFAULT_SPLITS, classes, args.others == "skip", accepted)
    manifest = index_tars(task, replace=args.force)
    parts = ", ".join(f"{s.samples:,} {name} in {len(s.shards):,} tars" for name, s in manifest.splits.items())
    left_out = f"; {manifest.settings['left_out']:,} samples left out" if manifest.settings["left_out"] else ""
    if task.only:
        left_out += f"; {manifest.settings['others']:,} samples of other classes skipped"
    print(f"{at.url}: {parts}; {manifest.num_classes:,} classes{left_out}")
    return 0


def _upgrade(args: argparse.Namespace, folder: Folder) -> int:
    others = {"--index-folder": args.index_folder, "--split": args.split, "--classes": args.classes}
    others |= {"--others": args.others != "error", "--skip-unlabelled": args.skip_unlabelled}
    others |= {"--unmarked": args.unmarked, "--force": args.force}
    given = [option for option, value in others.items() if value]
    if given:
        raise ForeignError(f"--upgrade is for data sets built by `shard`, {given[0]} for tars of others: give one")
    manifest, done = upgrade_dataset(folder)
    shards = sum(len(split.shards) for split in manifest.splits.values())
    state = f"{done:,} of {shards:,} shards upgraded" if done else "lacks nothing"
    print(f"{folder.url}: {state}; format {manifest.format_version}, id {manifest.dataset_id[:12]} as before")
    return 0


def _folder(path: str) -> Folder:
    path = dataset_folder(path)
    return Folder(path if is_url(path) else Path(path).absolute())
