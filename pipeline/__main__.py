"""The command line: ``python -m pipeline {pretrain,finetune,evaluate}``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from data_prep.manifest import DataPrepError
from pipeline import config as configuration

_EPILOG = """\
examples
  one process:      python -m pipeline pretrain configs/demo_pretrain.yaml
  all GPUs here:    launch/deepspeed.sh pretrain configs/pretrain_hornet_l_in22k_384.yaml
  many hosts:       HOSTFILE=hostfile launch/deepspeed.sh pretrain configs/pretrain_hornet_l_in22k_384.yaml
  other values:     ... pretrain CONFIG train.micro_batch=16 data.format=ffcv name=my-run
The same command continues an interrupted run. exit codes: 0 done, 1 error, 2 usage."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. What a user can mend is one line on stderr, unless --debug."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # Errors of this kind say what to change; anything else is a fault of ours, and its traceback is the report.
        if options.debug or not isinstance(error, ValueError | FloatingPointError):
            raise
        rank = os.environ.get("RANK", "0")
        # All ranks meet most errors together: rank 0 speaks for them, and only data differs from rank to rank.
        if rank == "0" or type(error).__name__ == "DataError":
            where = f" (rank {rank})" if rank != "0" else ""
            print(f"error{where}: {_one_line(error)}", file=sys.stderr, flush=True)
        return 1


def _train(options: argparse.Namespace) -> int:
    config = configuration.load(options.config, options.overrides)
    if options.print_config:
        print(config.to_yaml(), end="")
        return 0
    resume = options.resume == "auto"
    # Imported here: they take seconds, which a wrong key need not wait for.
    if options.check:
        from pipeline.preflight import preflight

        preflight(config, options.ranks, resume)
        return 0
    from pipeline import train

    train.main(options.command, config, resume)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from pipeline.evaluate import evaluate_checkpoint

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
        command.add_argument("--debug", action="store_true", help="tracebacks instead of one-line errors")
        command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # old launchers pass it
        command.set_defaults(run=_train)
    command = commands.add_parser("evaluate", help="top-1 and top-5 of a checkpoint on the validation split")
    command.add_argument("checkpoint", type=Path, help="a run folder (its newest checkpoint) or a checkpoint folder")
    command.add_argument("--data", type=Path, help="another dataset folder with the same classes")
    command.add_argument("--weights", choices=("ema", "model"), help="default: the EMA where there is one")
    command.add_argument("--debug", action="store_true", help="tracebacks instead of one-line errors")
    command.set_defaults(run=_evaluate)
    return parser


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    own = isinstance(error, DataPrepError) or type(error).__module__.startswith("pipeline.")
    return text if own else f"{type(error).__name__}: {text} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
