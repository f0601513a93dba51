"""What `shard` and `plan` both ask for: the source, what becomes of each image, and the settings these give."""

import argparse
import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from data_prep.storage import DataPrepError, is_url, number, place, share, user_path

if TYPE_CHECKING:  # imported where they are used: --help must not wait for them
    from data_prep.build.shards import ShardSettings
    from data_prep.sources.chunking import Source


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """What is read, and what becomes of each image: the options that `shard` and `plan` have in common."""
    add = parser.add_argument_group("what is read").add_argument
    add(
        "--source",
        required=True,
        type=user_path,
        metavar="PATH",
        help="archive, folder or URL with the training images",
    )
    add("--source-kind", metavar="KIND", help="what --source is, where detection is wrong (the names above)")
    add("--val-source", type=user_path, metavar="PATH", help="archive, folder or URL for the split 'val'")
    add(
        "--val-labels",
        type=user_path,
        metavar="FILE",
        help="classes of the images of --val-source, or of the folder val/ of --source, that lie in no class: lines of "
        "an image's name and its WordNet id; for ILSVRC2012_img_val.tar also the devkit archive, one WordNet id per "
        "line, or Kaggle's LOC_val_solution.csv",
    )
    add(
        "--rename-classes",
        action="store_true",
        help="take n01491361 for the class of folders and tars named n01491361_great_white_shark or N01491361",
    )
    add(
        "--val-per-class",
        type=number(1),
        default=0,
        metavar="N",
        help="without a validation source: hold N images "
        "of each class out of train, at most half of the class; chosen by a hash of the name, so every build takes the "
        "same",
    )
    add("--max-images-per-class", type=number(1), metavar="N", help="take only N training images of each class")
    add(
        "--exclude",
        type=user_path,
        metavar="FILE",
        help="leave these images out of train: the exclude.txt of `duplicates`",
    )
    add(
        "--duplicates",
        choices=("leaks", "drop", "keep"),
        default="leaks",
        help="images with the same bytes. leaks: a "
        "training image is left out where a validation image is the same; drop: and all but one in train; keep: all "
        "stay (default: %(default)s)",
    )
    add(
        "--max-reject",
        type=share,
        default=0.05,
        metavar="SHARE",
        help="stop with exit code 3 where a larger share of the images cannot be used, or belongs to no class (0.05)",
    )
    add = parser.add_argument_group("what becomes of an image").add_argument
    add(
        "--short-side", type=number(1), default=512, metavar="PX", help="shrink to this short side; never enlarge (512)"
    )
    add("--quality", type=number(1, 95), default=90, help="JPEG quality of images that are encoded anew (90)")
    add(
        "--reencode",
        choices=("never", "when-resized", "always"),
        default="when-resized",
        help="when-resized: "
        "a baseline RGB JPEG that is small enough passes byte for byte; never: whatever its size (default: "
        "%(default)s)",
    )
    add(
        "--truncated",
        choices=("reject", "keep"),
        default="reject",
        help="images that end too early, or lost data in the middle: reject them, or keep what is there, the rest gray "
        "or garbage (default: %(default)s)",
    )
    add(
        "--min-side",
        type=number(0),
        default=32,
        metavar="PX",
        help="reject images with a shorter side below (32; ImageNet-22K has about 2,000)",
    )
    add(
        "--exif-orientation",
        choices=("ignore", "apply"),
        default="ignore",
        help="ignore: pixels as ImageNet's other users see them (default)",
    )
    add(
        "--check",
        choices=("decode", "structure"),
        default="decode",
        help="of images that pass byte for byte: decode "
        "finds all damage a decoder can find; structure only looks at markers and the end, several times faster "
        "(default: %(default)s)",
    )
    add("--samples-per-shard", type=number(1), default=10_000, metavar="N", help="0.5 to 1 GB at the default (10000)")
    add("--seed", type=int, default=0, help="of the shuffle (0)")


def settings_of(args: argparse.Namespace) -> "ShardSettings":
    """The settings that the options of `add_source_arguments` give."""
    from data_prep.build.shards import ShardSettings

    return ShardSettings(
        short_side_px=args.short_side,
        quality=args.quality,
        reencode=args.reencode,
        truncated=args.truncated,
        min_side_px=args.min_side,
        exif_orientation=args.exif_orientation,
        check=args.check,
        samples_per_shard=args.samples_per_shard,
        seed=args.seed,
        max_images_per_class=args.max_images_per_class,
        val_per_class=args.val_per_class,
        duplicates=args.duplicates,
    )


def sources_of(args: argparse.Namespace) -> "list[Source]":
    """The sources that the options name. Raises SourceError; DataPrepError when two of them give validation images."""
    from data_prep.build.lost import refuse_other_classes
    from data_prep.sources.detect import open_source

    if args.val_source is not None and args.val_per_class:
        raise DataPrepError("--val-source and --val-per-class exclude each other: both make the split 'val'")
    if args.val_source is not None and _same_place(args.source, args.val_source):
        raise DataPrepError(f"--val-source and --source are both {args.source}: give images of their own")
    rename, labels = args.rename_classes, args.val_labels
    own = labels if args.val_source is None else None  # for the source's own folder val/
    train = open_source(place(args.source, "--source"), kind=args.source_kind, labels=own, rename=rename)
    if args.val_source is None:
        if labels is not None and "val" not in train.splits:
            raise DataPrepError(
                "--val-labels belongs to a --val-source, or to a folder val/ of --source: give ILSVRC2012_img_val.tar "
                "as --val-source"
            )
        if args.val_per_class and "val" in train.splits:
            raise DataPrepError(f"{args.source} has a validation split of its own: leave out --val-per-class")
        refuse_other_classes(train, train.known_classes("val"), train.known_classes("train"))
        return [train]
    if "val" in train.splits:
        raise DataPrepError(f"{args.source} has a validation split of its own: leave out --val-source")
    val = open_source(place(args.val_source, "--val-source"), split="val", labels=labels, rename=rename)
    if val.splits != ("val",):
        raise DataPrepError(
            f"{args.val_source} holds training images too: give its folder val as --val-source, or give it as --source"
        )
    refuse_other_classes(val, val.known_classes("val"), train.known_classes("train"))
    return [train, val]


def _same_place(one: str, other: str) -> bool:
    resolved = [path.rstrip("/") if is_url(path) else os.path.realpath(path) for path in (one, other)]
    return resolved[0] == resolved[1]


def exclusions_of(args: argparse.Namespace) -> Collection[tuple[str, str]]:
    """The images listed in --exclude."""
    if args.exclude is None:
        return ()
    from data_prep.duplicates.exclusions import read_exclusions

    return read_exclusions(args.exclude)
