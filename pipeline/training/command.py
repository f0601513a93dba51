"""The commands `pretrain`, `adapt` and `finetune`: options, the check before a launch, the run; other tasks share them.

What takes seconds to import is imported where it is used: options and wrong keys need not wait for it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.ranks.environment import travelling
from pipeline.ranks.handover import as_word, remove, write
from pipeline.ranks.lifetime import StopRequest

if TYPE_CHECKING:
    from pipeline.config.run import RunConfig
    from pipeline.training.task import Kind

EPILOG = """\
examples
  one process:      python -m pipeline pretrain configs/demo_pretrain.yaml
  all GPUs here:    launch/deepspeed.sh pretrain configs/pretrain_hornet_l_in22k_384.yaml
  to 384 px:        launch/deepspeed.sh adapt configs/adapt_hornet_l_gf_in22k_384.yaml
  many hosts:       HOSTFILE=hostfile launch/deepspeed.sh pretrain configs/pretrain_hornet_l_in22k_384.yaml
  other values:     ... pretrain CONFIG train.micro_batch=16 data.format=ffcv name=my-run
The same command continues an interrupted run. To stop one and lose nothing: `make stop RUN=...`.
exit codes: 0 done, 1 error, 2 usage, 75 stopped on request: queue it again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all."""
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="a YAML file; see configs/")
    add("overrides", nargs="*", metavar="key=value", help="dotted overrides, values as in YAML")
    add(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: go on from the newest checkpoint in the run folder; never: refuse a folder that has one",
    )
    add("--print-config", action="store_true", help="print the resolved configuration and leave")
    add("--check", action="store_true", help="check configuration, data and weights, and leave")
    add("--ranks", type=int, help="with --check: the number of ranks the run will have")
    add("--nodes", type=int, default=1, help="with --check: the number of hosts they are on")
    add("--hand-over", action="store_true", help="with --check: write the launch down for other hosts, print where")
    add("--debug", action="store_true", help="tracebacks instead of one-line errors")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # old launchers pass it


def command(options: argparse.Namespace) -> int:
    """Either command with its options parsed; returns the exit code. Raises what `run.main` and `preflight` raise."""
    from pipeline.config.load import Config

    def check(*arguments: Any) -> None:
        from pipeline.training.preflight import preflight

        preflight(*arguments)

    def kind() -> Kind:
        from pipeline.training.classification import CLASSIFICATION

        return CLASSIFICATION

    return carry_out(options, Config, check, kind, needs_weights=options.command != "pretrain")


def carry_out(
    options: argparse.Namespace,
    config_kind: type[RunConfig],
    check: Callable[..., None],
    kind: Callable[[], Kind],
    needs_weights: bool = False,
) -> int:
    """What the options of a training command ask for. `check` takes what `preflight` does; it and `kind` may import
    what takes seconds.
    """
    from data_prep.credentials import without_credentials
    from pipeline.config.load import load
    from pipeline.config.sections import ConfigError

    config = load(options.config, options.overrides, config_kind)
    shown = next((each for each in options.overrides if without_credentials(each) != each), None)
    if shown is not None:
        raise ConfigError(
            f"{without_credentials(shown)} comes with a password on the command line, which `ps` and the launchers' "
            f"logs show on every host: write it into a configuration file, or for MLflow into "
            f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    if options.print_config:
        print(config.to_yaml(), end="")
        return 0
    if needs_weights and config.init.checkpoint is None:
        raise ConfigError(
            f"{options.config}: {options.command} starts from weights, and init.checkpoint is null: set it to a run "
            f"folder, a checkpoint, a weight file or a model of MLflow's; training from random weights is `pretrain`"
        )
    resume = options.resume == "auto"
    if options.check:
        check(config, options.ranks, options.nodes, resume)
        if options.hand_over:
            more = ["--resume", options.resume, *(["--debug"] if options.debug else [])]
            folder = write(config.run_dir, options.command, config.to_yaml(), more, travelling(os.environ))
            try:
                print(as_word(folder), flush=True)
            except OSError:  # the launcher is gone, and nobody else would remove what may hold passwords
                remove(folder)
                raise
        return 0
    stop = StopRequest()  # before what takes seconds to import
    from pipeline.training import run

    return run.main(options.command, config, kind(), resume, stop)
