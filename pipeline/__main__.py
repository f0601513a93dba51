"""The command line: ``python -m pipeline {pretrain,finetune,evaluate,checkpoint,bench-data}``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from data_prep.storage import DataPrepError
from pipeline.checkpoints import inspect as inspect_checkpoint
from pipeline.config.load import load
from pipeline.data import bench as bench_data
from pipeline.ranks.lifetime import EXIT_REQUEUE, Terminated

_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out waiting")
_EPILOG = """\
examples
  one process:      python -m pipeline pretrain configs/demo_pretrain.yaml
  all GPUs here:    launch/deepspeed.sh pretrain configs/pretrain_hornet_l_in22k_384.yaml
  many hosts:       HOSTFILE=hostfile launch/deepspeed.sh pretrain configs/pretrain_hornet_l_in22k_384.yaml
  loader speed:     python -m pipeline bench-data CONFIG --need 2000
  checkpoints:      python -m pipeline checkpoint runs/demo-pretrain
  other values:     ... pretrain CONFIG train.micro_batch=16 data.format=ffcv name=my-run
The same command continues an interrupted run. To stop one and lose nothing: SIGUSR1 to any rank.
exit codes: 0 done, 1 error, 2 usage, 75 stopped on request: queue it again."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. What a user can mend is one line on stderr, unless --debug."""
    options = _parse(arguments)
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
        if rank == "0" or type(error).__name__ in ("DataError", "OutOfMemoryError") or "data worker" in text:
            where = f" (rank {rank})" if rank != "0" else ""
            print(f"error{where}: {text}", file=sys.stderr, flush=True)
        if "RANK" in os.environ and options.run is _train:
            os._exit(1)  # at once, or Python's own end would wait for the other ranks inside a collective
        return 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """argparse takes positional arguments only together; overrides may stand on both sides of an option."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(overrides) != len(rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *overrides]
    return options


def _train(options: argparse.Namespace) -> int:
    config = load(options.config, options.overrides)
    if options.print_config:
        print(config.to_yaml(), end="")
        return 0
    resume = options.resume == "auto"
    # Imported here: they take seconds, which a wrong key need not wait for.
    if options.check:
        from pipeline.training.preflight import preflight

        preflight(config, options.ranks, options.nodes, resume)
        return 0
    from pipeline.training import run

    return run.main(options.command, config, resume)


def _evaluate(options: argparse.Namespace) -> int:
    from pipeline.evaluation.accuracy import evaluate_checkpoint

    evaluate_checkpoint(options.checkpoint, options.data, options.weights)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Pretrain HorNet, fine-tune it, and measure it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = {
        "pretrain": "train from random weights (under the deepspeed launcher, torchrun, or alone)",
        "finetune": "the same code, starting from init.checkpoint: head mapped by WordNet id, filters resized",
    }
    for name, text in about.items():
        command = commands.add_parser(
            name, help=text, description=text, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file; see configs/")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, values as in YAML")
        command.add_argument(
            "--resume",
            choices=("auto", "never"),
            default="auto",
            help="auto: go on from the newest checkpoint in the run folder; never: refuse a folder that has one",
        )
        command.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
        command.add_argument("--check", action="store_true", help="check configuration, data and weights, and leave")
        command.add_argument("--ranks", type=int, help="with --check: the number of ranks the run will have")
        command.add_argument("--nodes", type=int, default=1, help="with --check: the number of hosts they are on")
        command.add_argument("--debug", action="store_true", help="tracebacks instead of one-line errors")
        command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # old launchers pass it
        command.set_defaults(run=_train)
    command = commands.add_parser("evaluate", help="top-1 and top-5 of a checkpoint on the validation split")
    command.add_argument("checkpoint", type=Path, help="a run folder (its newest checkpoint) or a checkpoint folder")
    command.add_argument("--data", help="another data set (folder or URL) with the same classes")
    command.add_argument("--weights", choices=("ema", "model"), help="default: the EMA where there is one")
    command.add_argument("--debug", action="store_true", help="tracebacks instead of one-line errors")
    command.set_defaults(run=_evaluate)
    command = commands.add_parser(
        "checkpoint",
        help=inspect_checkpoint.ABOUT,
        description=inspect_checkpoint.ABOUT,
        epilog=inspect_checkpoint.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect_checkpoint.add_arguments(command)
    command.set_defaults(run=inspect_checkpoint.command)
    text = "images per second of a configuration's data loader on this host, and whether that feeds the GPUs"
    command = commands.add_parser("bench-data", help=text, description=text)
    bench_data.add_arguments(command)
    command.set_defaults(run=bench_data.command)
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
    if isinstance(error, RuntimeError) and any(mark in text for mark in _LOST_PEER):
        return f"another rank failed or was lost, see its message ({text[:200]})"
    if isinstance(error, ValueError | OSError):
        return f"{kind}: {text} (--debug shows where)"
    return None


if __name__ == "__main__":
    sys.exit(main())
