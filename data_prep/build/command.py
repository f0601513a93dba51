"""The `shard` command: archives -> shuffled shards, ledger, manifest, and FFCV files."""

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.build.arguments import (
    add_source_arguments,
    exclusions_of,
    settings_of,
    sources_of,
)
from data_prep.build.lost import notes_of_lost
from data_prep.cluster import Cluster, add_cluster_arguments, open_cluster
from data_prep.credentials import without_credentials
from data_prep.storage import DataPrepError, is_url, number, place, refuse_unwritable, user_path

if TYPE_CHECKING:  # imported where they are used: --help must not wait for them
    from data_prep.build.output import BuildResult, Output
    from data_prep.sources.chunking import Source

DESCRIPTION = """\
Read an archive of images and write a data set that trains fast:
  dataset.json              the classes (WordNet ids, in label order), files, counts, checksums, settings
  train-000000.tar ...      shuffled WebDataset shards (KEY.jpg, KEY.cls, KEY.json), each with an index for seeking
  _info.json                what timm's reader of wds/ asks for
  train.beton               with --format ffcv or both: the same samples in the same order for FFCV
  ledger.parquet            what became of every image: kept, repaired, held_out, duplicate, rejected, and why

Sources, none of which is unpacked to disk, local or behind a URL (s3://bucket/winter21_whole.tar.gz):
  tar-of-tars               n01440764.tar, ... in one tar, compressed or not: winter21_whole.tar.gz, fall11_whole.tar,
                            ILSVRC2012_img_train.tar
  folder-of-tars            the same tars in a folder
  class-folders             one folder per class (ImageFolder)
  split-folders             train/ and val/ (training/, valid/, validation/) of class folders, also as
                            imagenet21k_train, imagenet21k_val (21K-P); a flat val/ with --val-labels
  tar-of-class-folders      any of these trees in one tar: imagenet21k_resized.tar.gz
  ilsvrc-val                ILSVRC2012_img_val.tar, flat, with --val-labels ILSVRC2012_devkit_t12.tar.gz
Classes are named by WordNet id; --rename-classes finds it in n01491361_great_white_shark. What a
source is gets detected; --source-kind overrides.

The same source and settings give the same bytes, whatever runs it. Killed at any moment, the same command goes on
where it was: finished pieces stay in OUTPUT/.data_prep until the data set is whole. `plan` predicts time and disk."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `shard`."""
    add_source_arguments(parser)
    add = parser.add_argument_group("what is written").add_argument
    add("--output", required=True, type=user_path, metavar="DIR", help="folder or URL of the data set; made if missing")
    add(
        "--work",
        type=user_path,
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
        "--salvage",
        action="store_true",
        help="go on where parts of an archive cannot be read; without it: exit code 3 when all else is read",
    )
    add("--ignore-disk", action="store_true", help="start even where the disk seems too small")
    add("--force", action="store_true", help="replace what is in --output, whatever its settings")
    add_cluster_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Build shards, and the FFCV files if asked for; print the summary."""
    from data_prep.build.output import Output
    from data_prep.build.summary import print_summary

    output = Output(place(args.output, "--output"), args.work and place(args.work, "--work"))
    if args.force or not output.folder.exists("dataset.json"):
        refuse_unwritable(output.folder, "choose another --output")
        refuse_unwritable(output.work, "choose another --work")
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
    if not output.folder.exists("dataset.json"):
        for note in notes_of_lost(sources, args.max_reject):
            print(note, flush=True)
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
        name=args.name or without_credentials(output.folder.url).rsplit("/", 1)[-1],
        exclude=exclude,
        max_reject=args.max_reject,
        salvage=args.salvage,
        force=args.force,
        rename=args.rename_classes,
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
