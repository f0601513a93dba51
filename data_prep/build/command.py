"""The `shard` command: archives -> shuffled shards, ledger, manifest, and FFCV files."""

import argparse
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.cluster import Cluster, add_cluster_arguments, open_cluster
from data_prep.manifest import DataPrepError
from data_prep.storage import is_url

if TYPE_CHECKING:  # imported where they are used: --help must not wait for them
    from data_prep.build.output import BuildResult, Output
    from data_prep.build.shards import ShardSettings
    from data_prep.sources.chunking import Source

DESCRIPTION = """\
Read an archive of images and write a data set that trains fast:
  dataset.json              the classes (WordNet ids, in label order), files, counts, checksums, settings
  train-000000.tar ...      shuffled WebDataset shards (KEY.jpg, KEY.json), each with an index for seeking
  train.beton               with --format ffcv or both: the same samples in the same order for FFCV
  ledger.parquet            what became of every image: kept, repaired, held_out, duplicate, rejected, and why

Sources, none of which is unpacked to disk, local or behind a URL (s3://bucket/winter21_whole.tar.gz):
  tar-of-tars               n01440764.tar, ... in one tar, compressed or not: winter21_whole.tar.gz, fall11_whole.tar,
                            ILSVRC2012_img_train.tar
  folder-of-tars            the same tars in a folder
  class-folders             one folder per class (ImageFolder)
  split-folders             train/ and val/ of class folders, also as imagenet21k_train, imagenet21k_val (21K-P)
  tar-of-class-folders      any of these trees in one tar: imagenet21k_resized.tar.gz
  ilsvrc-val                ILSVRC2012_img_val.tar, flat, with --val-labels ILSVRC2012_devkit_t12.tar.gz
Classes are named by WordNet id. What a source is gets detected; --source-kind overrides.

The same source and settings give the same bytes, whatever runs it. Killed at any moment, the same command goes on
where it was: finished pieces stay in OUTPUT/.data_prep until the data set is whole. `plan` predicts time and disk."""


def number(minimum: int, maximum: int | None = None) -> "type[int]":
    """An argparse type: an integer within bounds."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum or (maximum is not None and value > maximum):
            raise argparse.ArgumentTypeError(f"{value} is not in {minimum}..{'' if maximum is None else maximum}")
        return value

    parse.__name__ = "int"  # argparse puts it into "invalid int value"
    return parse  # type: ignore[return-value]  # argparse takes any callable


def share(text: str) -> float:
    """An argparse type: 0.05 or 5%."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """What is read, and what becomes of each image: the options that `shard` and `plan` have in common."""
    add = parser.add_argument_group("what is read").add_argument
    add("--source", required=True, metavar="PATH", help="archive, folder or URL with the training images")
    add("--source-kind", metavar="KIND", help="what --source is, where detection is wrong (the names above)")
    add("--val-source", metavar="PATH", help="archive, folder or URL for the split 'val'")
    add(
        "--val-labels",
        metavar="FILE",
        help="for ILSVRC2012_img_val.tar: the devkit archive, a text file "
        "with one WordNet id per line, or Kaggle's LOC_val_solution.csv",
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
    add("--exclude", type=Path, metavar="FILE", help="leave these images out of train: the exclude.txt of `duplicates`")
    add(
        "--duplicates",
        choices=("leaks", "drop", "keep"),
        default="leaks",
        help="images with the same bytes. leaks: a "
        "training image is left out where a validation image is the same; drop: and all but one in train; keep: all "
        "stay (default: %(default)s)",
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
        help="images that end too early: reject them, or keep what is there, the rest gray (default: %(default)s)",
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `shard`."""
    add_source_arguments(parser)
    add = parser.add_argument_group("what is written").add_argument
    add("--output", required=True, metavar="DIR", help="folder or URL of the data set; made if missing")
    add(
        "--work",
        metavar="DIR",
        help="folder or URL for unfinished work, about as large as the result (OUTPUT/.data_prep)",
    )
    add("--name", help="name of the data set in dataset.json (default: name of the output folder)")
    add(
        "--format",
        choices=("webdataset", "ffcv", "both"),
        default="webdataset",
        help="ffcv is the same as both: the "
        ".beton is made from the shards, and they stay as the archive (default: %(default)s)",
    )
    add(
        "--beton-mode",
        choices=("jpg", "proportion", "raw"),
        default="jpg",
        help="what the .beton holds: the shards' JPEG bytes, pixels, or some of each (default: %(default)s)",
    )
    add(
        "--beton-max-side",
        type=number(0),
        default=0,
        metavar="PX",
        help="shrink images of the .beton to this longer side (0: as in the shards)",
    )
    add(
        "--max-reject",
        type=share,
        default=0.05,
        metavar="SHARE",
        help="stop with exit code 3 where a larger share of the images cannot be used (0.05)",
    )
    add(
        "--salvage",
        action="store_true",
        help="go on where parts of an archive cannot be read; without it: exit code 3 when all else is read",
    )
    add("--ignore-disk", action="store_true", help="start even where the disk seems too small")
    add("--force", action="store_true", help="replace what is in --output, whatever its settings")
    add_cluster_arguments(parser)


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
    from data_prep.sources.detect import open_source

    train = open_source(_place(args.source, "--source"), kind=args.source_kind)
    if args.val_source is None:
        if args.val_labels is not None:
            raise DataPrepError("--val-labels belongs to a --val-source: give ILSVRC2012_img_val.tar there")
        if args.val_per_class and "val" in train.splits:
            raise DataPrepError(f"{args.source} has a validation split of its own: leave out --val-per-class")
        return [train]
    if args.val_per_class:
        raise DataPrepError("--val-source and --val-per-class exclude each other: both make the split 'val'")
    if "val" in train.splits:
        raise DataPrepError(f"{args.source} has a validation split of its own: leave out --val-source")
    val = open_source(_place(args.val_source, "--val-source"), split="val", labels=args.val_labels)
    if val.splits != ("val",):
        raise DataPrepError(
            f"{args.val_source} holds training images too: give its folder val as --val-source, or give it as --source"
        )
    return [train, val]


def _place(path: str, option: str) -> str:
    """A URL as it is, a path made absolute: workers may run in another folder."""
    if not path:
        raise DataPrepError(f"{option} is empty: is the variable in your command set?")
    return path if is_url(path) else os.path.abspath(path)


def exclusions_of(args: argparse.Namespace) -> Collection[tuple[str, str]]:
    """The images listed in --exclude."""
    if args.exclude is None:
        return ()
    from data_prep.duplicates.exclusions import read_exclusions

    return read_exclusions(args.exclude)


def run(args: argparse.Namespace) -> int:
    """Build shards, and the FFCV files if asked for; print the summary."""
    from data_prep.build.output import Output
    from data_prep.build.summary import print_summary

    output = Output(_place(args.output, "--output"), args.work and _place(args.work, "--work"))
    exclude = exclusions_of(args)
    want_beton = args.format != "webdataset"
    if want_beton and is_url(args.output):
        raise DataPrepError(f"FFCV reads local files only, and --output is {args.output}: give --format webdataset")
    if want_beton and not output.folder.exists("dataset.json"):
        from data_prep.beton.file import require_ffcv

        require_ffcv()  # before the hours of work, not after; takes seconds, so not where the work is done already
    sources = sources_of(args)
    for source in sources:
        _refuse_output_inside(output.folder.url, source.path)
        print(source.description, flush=True)
    if not args.ignore_disk and not output.folder.exists("dataset.json"):
        from data_prep.build.plan import refuse_small_disk

        refuse_small_disk(
            sources, settings_of(args), output, beton_mode=args.beton_mode if want_beton else None, workers=args.workers
        )
    with open_cluster(args) as cluster:
        result = _build(args, sources, output, exclude, cluster, want_beton)
    print_summary(result, output.folder)
    return 0


def _build(
    args: argparse.Namespace,
    sources: "list[Source]",
    output: "Output",
    exclude: Collection[tuple[str, str]],
    cluster: Cluster,
    want_beton: bool,
) -> "BuildResult":
    from data_prep.build.shards import build_shards

    result = build_shards(
        sources,
        output,
        settings_of(args),
        cluster,
        name=args.name or output.folder.url.rsplit("/", 1)[-1],
        exclude=exclude,
        max_reject=args.max_reject,
        salvage=args.salvage,
        force=args.force,
    )
    if want_beton:
        from data_prep.beton.sample import BetonSettings
        from data_prep.beton.write import add_betons

        beton = BetonSettings(mode=args.beton_mode, max_side_px=args.beton_max_side, quality=args.quality)
        manifest = add_betons(Path(output.folder.url), result.manifest, beton, cluster)
        result.already_built = result.already_built and manifest == result.manifest
        result.manifest = manifest
    return result


def _refuse_output_inside(output: str, source: str) -> None:
    if is_url(output) or is_url(source):
        inside = output.startswith(source.rstrip("/") + "/")
    else:
        inside = Path(source).is_dir() and Path(output).resolve().is_relative_to(Path(source).resolve())
    if inside:
        raise DataPrepError(f"output {output} lies inside the source {source}: choose a folder outside of it")
