"""The command line of data prep: python -m data_prep {demo,plan,shard,shard-dense,index,labels,duplicates,verify}."""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from data_prep.credentials import keep_out_of_output
from data_prep.storage import NOT_WRITABLE, DataPrepError, OncePath

EPILOG = """\
the usual order:
  python -m data_prep demo --help                                         small real data sets, to try things
  python -m data_prep plan  --source ARCHIVE --output data/NAME           what it will take: images, disk, hours
  python -m data_prep shard --source ARCHIVE --output data/NAME           your own archive
  python -m data_prep shard-dense --coco FOLDER --output data/coco        images with masks or boxes
  python -m data_prep index data/NAME                                     or tars that somebody else wrote, as they are
  python -m data_prep verify data/NAME                                    every sample decoded, against the manifest
  python -m data_prep duplicates data/NAME --against data/in1k            validation images hidden in train
  python -m data_prep labels data/NAME imagenet-1k                        which classes two data sets share
"""

# command: (module with add_arguments and run, line of help)
COMMANDS = {
    "demo": ("data_prep.demo.command", "build two small ImageNet-shaped archives of real images"),
    "plan": ("data_prep.build.plan", "sample an archive; predict images, shards, disk and hours"),
    "shard": ("data_prep.build.command", "archive -> shuffled shards, ledger, manifest, FFCV file"),
    "shard-dense": ("data_prep.dense.command", "ADE20K or COCO -> shards of images with masks or boxes"),
    "index": (
        "data_prep.foreign.command",
        "WebDataset tars of others -> their indexes and manifest, in place; --upgrade: of ours, a former version's",
    ),
    "labels": ("data_prep.labels.report", "compare two label spaces"),
    "duplicates": ("data_prep.duplicates.search", "near-duplicates, and evaluation images hidden in train"),
    "verify": ("data_prep.verify.command", "check every sample of a data set against its manifest"),
}


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser. Only the options of the command that `argv` asks for are added: others' packages load slowly."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Raw image archives -> WebDataset shards and FFCV files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, text) in COMMANDS.items():
        if argv[:1] != [name]:
            commands.add_parser(name, help=text, add_help=False)
            continue
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise DataPrepError(f"`{name}` needs the package {error.name}: run `make setup`") from error
        command = commands.add_parser(
            name,
            parents=[common],
            help=text,
            description=getattr(module, "DESCRIPTION", text),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for action in (None, "store"):
            command.register("action", action, OncePath)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 an error told in one line, 2 wrong usage, 3 too many images
    rejected (or leaked, with `duplicates --fail-on-leak`), 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        args = build_parser(argv).parse_args(argv)
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        print("\nerror: interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    except (DataPrepError, OSError) as error:
        if debug:
            raise
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            text += ": make room in the output folder, then give the same command again: it goes on from there"
        elif isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            text += ": give a folder that this user may read, and write to where something is written"
        print(f"error: {text}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    keep_out_of_output()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. Native threads of the libraries can abort an interpreter that ends in the usual way, and with it
    # the exit code.
    os._exit(code)
