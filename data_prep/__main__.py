"""The command line of data prep: python -m data_prep {demo,shard,labels}."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.manifest import MANIFEST_NAME, DataPrepError

EPILOG = """\
the usual order:
  python -m data_prep demo --help                                         small real data sets, to try things
  python -m data_prep shard --source ARCHIVE --output data/NAME           your own archive
  python -m data_prep labels data/NAME imagenet-1k                        which classes two data sets share
"""

SHARD_DESCRIPTION = """\
Read an archive of images, class by class, and write a data set that trains fast:
  dataset.json              the classes (WordNet ids, in label order), files, counts, checksums, settings
  train-000000.tar ...      shuffled WebDataset shards (KEY.jpg, KEY.json), each with an index for seeking
  train.beton               with --format ffcv or both: the same samples in the same order for FFCV
  rejected.jsonl            one line for each image that could not be used, with the reason

Sources, none of which is unpacked to disk:
  a tar of per-synset tars (n01440764.tar, ...), compressed or not, as ImageNet-22K is distributed;
  a folder of per-synset tars;  a folder with one folder per class. Classes are named by WordNet id.

The same source and settings give the same bytes, whatever --workers is. A finished data set is not built again;
an interrupted one is built by giving the same command again. While it builds, the output folder holds each image
twice (about 51 kB per image and copy at the default size)."""


def _number(minimum: int, maximum: int | None = None) -> "type[int]":
    def parse(text: str) -> int:
        value = int(text)
        if value < minimum or (maximum is not None and value > maximum):
            raise argparse.ArgumentTypeError(f"{value} is not in {minimum}..{'' if maximum is None else maximum}")
        return value

    parse.__name__ = "int"  # argparse puts it into "invalid int value"
    return parse  # type: ignore[return-value]  # argparse takes any callable


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser. Options of `demo` are only added when `argv` asks for it: its packages are optional."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Raw image archives -> WebDataset shards and FFCV files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", parents=[common], help="build two small ImageNet-shaped archives of real images")
    if argv[:1] == ["demo"]:
        try:
            from data_prep.demo import add_arguments
        except ModuleNotFoundError as error:
            raise DataPrepError(f"the demo needs the package {error.name}: run `make setup`") from error
        add_arguments(demo)

    shard = commands.add_parser(
        "shard",
        parents=[common],
        help="archive -> shuffled shards, manifest, FFCV file",
        description=SHARD_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = shard.add_argument
    add("--source", type=Path, required=True, metavar="PATH", help="archive or folder with the training images")
    validation = shard.add_mutually_exclusive_group()
    validation.add_argument("--val-source", type=Path, metavar="PATH", help="archive or folder for the split 'val'")
    validation.add_argument(
        "--val-per-class",
        type=_number(1),
        default=0,
        metavar="N",
        help="without --val-source: take N images of each class out of train, at most half of the class; "
        "chosen by a hash of the name, so every build takes the same",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the data set; made if missing")
    add(
        "--format",
        choices=("webdataset", "ffcv", "both"),
        default="webdataset",
        help="ffcv is the same as both: the .beton is made from the shards, and they stay as the archive "
        "(default: %(default)s)",
    )
    add("--name", help="name of the data set in dataset.json (default: name of the output folder)")
    add(
        "--short-side",
        type=_number(1),
        default=512,
        metavar="PX",
        help="shrink to this short side; never enlarge (512)",
    )
    add("--quality", type=_number(1, 95), default=90, help="JPEG quality of images that are encoded anew (90)")
    add("--samples-per-shard", type=_number(1), default=10_000, metavar="N", help="about 0.5 GB at the default (10000)")
    add("--seed", type=int, default=0, help="of the shuffle (0)")
    add("--max-images-per-class", type=_number(1), metavar="N", help="take only N training images of each class")
    add(
        "--workers",
        type=_number(1),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that decode and encode (default: one per CPU, here %(default)s)",
    )
    add("--force", action="store_true", help="replace the data set in --output, whatever its settings")

    labels = commands.add_parser(
        "labels",
        parents=[common],
        help="compare two label spaces",
        description="Print how the classes of B map into A. Each is a data set folder, or one of imagenet-1k, "
        "winter21-p (10,450 classes), hornet-22k (10,459: the head of the published checkpoints).",
    )
    labels.add_argument("a", metavar="A")
    labels.add_argument("b", metavar="B")
    return parser


def run_demo(args: argparse.Namespace) -> int:
    """Build the demo archives."""
    from data_prep.demo import run
    from data_prep.demo_archive import DemoError

    try:
        return run(args) or 0
    except DemoError as error:
        raise DataPrepError(str(error)) from error


def run_shard(args: argparse.Namespace) -> int:
    """Build shards, and the FFCV files if asked for; print the summary."""
    from data_prep.beton import add_betons, require_ffcv
    from data_prep.shards import ShardSettings, build_shards
    from data_prep.sources import Source

    source = Source(args.source)
    val_source = Source(args.val_source) if args.val_source else None
    if args.format != "webdataset" and not (args.output / MANIFEST_NAME).exists():
        require_ffcv()  # before the hours of work, not after; takes seconds, so not where the work is done already
    settings = ShardSettings(
        short_side_px=args.short_side,
        quality=args.quality,
        samples_per_shard=args.samples_per_shard,
        seed=args.seed,
        max_images_per_class=args.max_images_per_class,
        val_per_class=args.val_per_class,
    )
    result = build_shards(
        source,
        args.output,
        settings,
        name=args.name or args.output.resolve().name,
        val_source=val_source,
        workers=args.workers,
        force=args.force,
    )
    already_built = result.already_built
    if args.format != "webdataset":
        manifest = add_betons(args.output, result.manifest)
        already_built = already_built and manifest == result.manifest
        result.manifest = manifest
    from data_prep.summary import print_summary

    print_summary(result, args.output, already_built)
    return 0


def run_labels(args: argparse.Namespace) -> int:
    """Print matched and unmatched classes of two label spaces."""
    from data_prep import labels
    from data_prep.manifest import Manifest

    named = {
        "imagenet-1k": labels.imagenet_1k_synsets,
        "winter21-p": labels.winter21_p_synsets,
        "hornet-22k": labels.published_hornet_22k_synsets,
    }
    a, b = (named[x]() if x in named else Manifest.load(x).synsets for x in (args.a, args.b))
    mapped = labels.map_labels(a, b)
    print(f"{args.a}: {len(a)} classes; {args.b}: {len(b)} classes; in both: {len(mapped.matched)}")
    for wnid in mapped.unmatched:
        print(f"only in {args.b}: {wnid} {labels.lemma(wnid)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 an error told in one line, 2 wrong usage, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        args = build_parser(argv).parse_args(argv)
        commands = {"demo": run_demo, "shard": run_shard, "labels": run_labels}
        return commands[args.command](args)
    except KeyboardInterrupt:
        print("\nerror: interrupted; the same command starts it again", file=sys.stderr)
        return 130
    except (DataPrepError, OSError) as error:
        if debug:
            raise
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            text += ": make room in the output folder, then give the same command again"
        print(f"error: {text}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
