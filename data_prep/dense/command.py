"""The `shard-dense` command: ADE20K or COCO, or sets in their layouts -> shards, ledger, manifest."""

import argparse
import os
import shutil
from typing import TYPE_CHECKING

from data_prep.cluster import add_cluster_arguments, open_cluster
from data_prep.credentials import without_credentials
from data_prep.storage import DataPrepError, Folder, is_url, number, place, refuse_unwritable, share, user_path

if TYPE_CHECKING:  # imported where they are used: --help must not wait for them
    from data_prep.dense.source import Source

DISK_SHARE = 1.1  # of the images' bytes: masks, JSON and the tars' headers beside them
DESCRIPTION = """\
Read images with masks or boxes, and write a data set that `python -m pipeline segment` and `detect` train on:
  dataset.json              classes with the numbers of the source, files, counts, checksums, settings
  train-000000.tar ...      shuffled WebDataset shards, each with an index for seeking; of each image
                            KEY.jpg, KEY.json, with --ade20k also KEY.png, its mask
  ledger.parquet            what became of every image, and of every annotation that was not taken as it is

Sources, none of which is unpacked to disk:
  --ade20k PATH             the folder ADEChallengeData2016, or ADEChallengeData2016.zip: images/, annotations/,
                            objectInfo150.txt, sceneCategories.txt. In masks 0 becomes 255 (ignored), 1..150 0..149
  --coco FOLDER             train2017, val2017 and annotations/instances_{train,val}2017.json; or as published:
                            train2017.zip, val2017.zip, annotations_trainval2017.zip. Polygons become RLE masks,
                            category ids labels from 0, in their order
Sets of your own in one of these layouts are read alike, with whatever classes they name.

Images keep their JPEG bytes; what is no baseline RGB JPEG is encoded anew. No image is shrunk or turned: annotations
are of the pixels as stored, whatever EXIF says. Annotation ids of COCO that begin at 0 or are given twice are refused.

The same source and settings give the same bytes, whatever runs it. Killed at any moment, the same command goes on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `shard-dense`."""
    group = parser.add_argument_group("what is read (one of them)").add_mutually_exclusive_group(required=True)
    group.add_argument("--ade20k", type=user_path, metavar="PATH", help="ADEChallengeData2016, folder or zip")
    group.add_argument(
        "--coco", type=user_path, metavar="FOLDER", help="COCO 2017's images and instances, or their zips"
    )
    add = parser.add_argument_group("what becomes of it").add_argument
    add("--splits", nargs="+", choices=("train", "val"), default=["train", "val"], help="leave one out (default: both)")
    add(
        "--max-reject",
        type=share,
        default=0.05,
        metavar="SHARE",
        help="stop with exit code 3 where a larger share of a split's images cannot be used (0.05)",
    )
    add("--quality", type=number(1, 95), default=95, help="JPEG quality of images that are encoded anew (95)")
    add("--samples-per-shard", type=number(1), default=1_000, metavar="N", help="images a shard (1000)")
    add("--seed", type=int, default=0, help="of the shuffle (0)")
    add = parser.add_argument_group("what is written").add_argument
    add("--output", type=user_path, metavar="DIR", help="folder or URL of the data set; made if missing")
    add("--work", type=user_path, metavar="DIR", help="folder or URL for notes of unfinished work (OUTPUT/.data_prep)")
    add("--name", help="name of the data set in dataset.json (default: name of the output folder)")
    add("--plan", action="store_true", help="say what is there and what it will take; read no image, write nothing")
    add("--ignore-disk", action="store_true", help="start even where the disk seems too small")
    add("--force", action="store_true", help="replace what is in --output, whatever its settings")
    add_cluster_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Build the data set; print what was found, then what became of it."""
    from data_prep.dense.build import DenseSettings, build_dense
    from data_prep.dense.summary import print_summary
    from data_prep.writer import BuildFolder

    if args.output is None and not args.plan:
        raise DataPrepError("--output is missing: give the folder of the data set (or --plan to look at the source)")
    output = None
    if args.output is not None:
        output = BuildFolder(place(args.output, "--output"), args.work and place(args.work, "--work"))
        if not args.plan and (args.force or not output.folder.exists("dataset.json")):
            refuse_unwritable(output.folder, "choose another --output")
            refuse_unwritable(output.work, "choose another --work")
    source = _source(args, output.folder if output else None)
    for line in source.description():
        print(line, flush=True)
    settings = DenseSettings(quality=args.quality, samples_per_shard=args.samples_per_shard, seed=args.seed)
    image_bytes = sum(split.image_bytes for split in source.splits)
    if output is not None and not args.ignore_disk and not output.folder.exists("dataset.json"):
        _refuse_small_disk(output.folder, image_bytes)
    if args.plan:
        shards = sum(-(-len(split.items) // settings.samples_per_shard) for split in source.splits)
        print(f"plan: about {image_bytes * DISK_SHARE / 1e6:,.0f} MB in {shards:,} shards; every image is decoded once")
        return 0
    assert output is not None
    name = args.name or without_credentials(output.folder.url).rsplit("/", 1)[-1]
    with open_cluster(args) as cluster:
        result = build_dense(source, output, settings, cluster, name=name, max_reject=args.max_reject, force=args.force)
    print_summary(result, output.folder)
    return 0


def _source(args: argparse.Namespace, output: Folder | None) -> "Source":
    from data_prep.dense.ade20k import open_ade20k
    from data_prep.dense.coco import open_coco

    option, given = ("--ade20k", args.ade20k) if args.coco is None else ("--coco", args.coco)
    path = place(given, option)
    if is_url(path):
        raise DataPrepError(f"{option} {path} is a URL, and single images are read from it: copy it to a disk first")
    inside = f"{os.path.realpath(output.url)}/".startswith(f"{os.path.realpath(path)}/") if output else False
    if output is not None and output.is_local and inside:
        raise DataPrepError(f"output {output.url} lies inside the source {path}: choose a folder outside of it")
    splits = tuple(split for split in ("train", "val") if split in args.splits)
    return open_ade20k(path, splits) if args.coco is None else open_coco(path, splits)


def _refuse_small_disk(output: Folder, image_bytes: int) -> None:
    if not output.is_local:
        return
    path = output.url
    present = 0
    while not os.path.exists(path):
        path = os.path.dirname(path)
    if path == output.url:  # what an interrupted build has there counts as free
        present = sum(size or 0 for size in output.sizes().values())
    free = shutil.disk_usage(path).free + present
    needed = int(image_bytes * DISK_SHARE)
    if needed > free:
        raise DataPrepError(
            f"{output.url} needs about {needed / 1e9:,.1f} GB and its disk has {free / 1e9:,.1f} GB: make room, choose "
            "another --output, or start all the same with --ignore-disk"
        )
