"""The command line: ``python -m pipeline COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from data_prep.credentials import keep_out_of_output
from data_prep.storage import DataPrepError
from pipeline.ranks.lifetime import EXIT_REQUEUE, Terminated

# Before pydantic is imported, which would look for plugins in the metadata of every installed package.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

_STORES = ("botocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "adlfs", "google", "azure")  # what they say is for users
_OF_RANKS = ("pretrain", "adapt", "finetune", "segment", "detect", "evaluate", "evaluate-segment", "evaluate-detect")
_OF_ONE_RANK = ("DataError", "OutOfMemoryError", "UnmetError")
_TRAINING = "pipeline.training.command"
# command: (module with add_arguments, command and perhaps EPILOG; line of help). Imported for the command asked for.
_COMMANDS = {
    "pretrain": (_TRAINING, "train from random weights (under the deepspeed launcher, torchrun, or alone)"),
    "adapt": (
        _TRAINING,
        "the same net and classes at a larger resolution, from init.checkpoint, step by step if asked",
    ),
    "finetune": (_TRAINING, "the same, starting from init.checkpoint: head mapped by WordNet id, filters resized"),
    "segment": ("pipeline.dense.command", "train a segmentation on a HorNet backbone, from a set with masks"),
    "detect": ("pipeline.detection.command", "train a detector on a HorNet backbone, from a set with boxes or masks"),
    "evaluate-segment": (
        "pipeline.dense.measure_command",
        "a segmentation measured: mIoU, class by class; by windows, scales and mirror images",
    ),
    "evaluate-detect": (
        "pipeline.detection.measure_command",
        "a detector measured: COCO's average precision of boxes and masks, class by class",
    ),
    "evaluate": (
        "pipeline.evaluation.command",
        "a checkpoint measured: accuracy, calibration, confusion; on test sets as they are published",
    ),
    "export": ("pipeline.export.command", "a model handed over: for timm, ONNX, torch.export, with a model card"),
    "stop": ("pipeline.training.stop", "ask a run, on whatever hosts, to save a checkpoint and stop"),
    "review": ("pipeline.review.command", "runs compared: here, as one page for a browser, and in MLflow"),
    "sync-tracking": ("pipeline.records.command", "send MLflow what it was not reached for while runs were under way"),
    "checkpoint": ("pipeline.checkpoints.command", "what is in a run's checkpoints, and whether they are whole"),
    "doctor": (
        "pipeline.doctor.command",
        "what would go wrong on the hosts of a run: versions, GPUs, data, disks, network",
    ),
    "plan": ("pipeline.planning.command", "memory, hours and cost of a run before it is started; no GPU is needed"),
    "bench-data": ("pipeline.bench_data.command", "images per second of a configuration's data loader on this host"),
}
_EPILOG = """\
examples
  one process:      python -m pipeline pretrain configs/demo_pretrain.yaml
  all GPUs here:    launch/deepspeed.sh pretrain configs/pretrain_hornet_l_in22k_384.yaml
  before the money: python -m pipeline plan CONFIG --gpu h200 --gpus 64
  accuracy:         python -m pipeline evaluate runs/demo-finetune
  hand it over:     python -m pipeline export runs/demo-finetune --to timm
  loader speed:     python -m pipeline bench-data CONFIG --need 2000
  checkpoints:      python -m pipeline checkpoint runs/demo-pretrain
  compare runs:     python -m pipeline review
  stop a run:       python -m pipeline stop runs/demo-pretrain
  MLflow was away:  python -m pipeline sync-tracking
`python -m pipeline COMMAND --help` has the options of each.
exit codes: 0 done, 1 error, 2 usage, 75 stopped on request: queue it again."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. What a user can mend is one line on stderr, unless --debug."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except Terminated:
        os._exit(EXIT_REQUEUE)  # at once, as below
    except Exception as error:
        text = _explain(error)
        # Where an error says what to change it is one line; anything else is our fault, and its traceback the report.
        if options.debug or text is None:
            raise
        rank = os.environ.get("RANK", "0")
        # All ranks meet most errors together: rank 0 speaks for them. What it cannot know differs from rank to rank.
        kind = type(error).__name__
        if kind == "LostPeerError":  # said already, by one of those that are left
            pass
        elif rank == "0" or kind in _OF_ONE_RANK or "data worker" in text:
            where = f" (rank {rank})" if rank != "0" else ""
            print(f"error{where}: {text}", file=sys.stderr, flush=True)
        if "RANK" in os.environ and options.command in _OF_RANKS:
            os._exit(1)  # at once, or Python's own end would wait for the other ranks inside a collective
        return 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    """argparse takes positional arguments only together; overrides may stand on both sides of an option."""
    parser = _parser(arguments[0] if arguments else "")
    options, rest = parser.parse_known_args(arguments)
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(overrides) != len(rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *overrides]
    return options


def _parser(asked: str) -> argparse.ArgumentParser:
    """The parser, with the options of the command `asked` alone: those of the others would cost their imports."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Pretrain HorNet, fine-tune it, and measure it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, text) in _COMMANDS.items():
        if name != asked:
            commands.add_parser(name, help=text, add_help=False)
            continue
        module = importlib.import_module(module_name)
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=getattr(module, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.command)
    return parser


def _explain(error: Exception) -> str | None:
    """The one line for an error that a user can do something about, else None."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, DataPrepError | FloatingPointError) or type(error).__module__.startswith("pipeline."):
        return text
    if kind == "OutOfMemoryError":
        return f"out of GPU memory: lower train.micro_batch, or set model.checkpointing=block ({text[:200]})"
    if isinstance(error, RuntimeError) and "DataLoader worker" in text and "is killed by signal" in text:
        return f"a data worker was killed, for memory perhaps: lower data.workers_per_rank ({text[:200]})"
    if isinstance(error, ValueError | OSError) or type(error).__module__.partition(".")[0] in _STORES:
        return f"{kind}: {text} (--debug shows where)"
    return None


if __name__ == "__main__":
    keep_out_of_output()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written and closed; taking a thousand modules apart takes a second
