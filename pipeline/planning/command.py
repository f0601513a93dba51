"""The command `plan`: its options. What it does is imported when it is asked for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EPILOG = """\
examples
  python -m pipeline plan configs/pretrain_hornet_l_in22k_384.yaml --gpu h200 --gpus 64 --price 2.5
  python -m pipeline plan configs/pretrain_hornet_l_in22k_384.yaml train.micro_batch=64 model.checkpointing=block
  python -m pipeline plan CONFIG --policies all
  python -m pipeline plan CONFIG --plot plan.png --json > plan.json
All numbers are predictions; no GPU is needed. The net is traced on fake tensors: half a minute of a core for HorNet-L.
--gpu-rates FILE, JSON or YAML, replaces guesses by what was measured; every key but gpu may be left out:
  {"gpus": [{"gpu": "h200", "gemm_tflops": {"bf16": 780}, "all_reduce_gbs": {"8": 360},
             "train": [{"model": "hornet_large_7x7", "resolution": 384, "policy": "selective",
                        "precision": "bf16", "images_per_second": 600}]}]}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="a YAML file; see configs/")
    add("overrides", nargs="*", metavar="key=value", help="dotted overrides, values as in YAML")
    add(
        "--gpu",
        default="h100",
        metavar="KIND",
        help="h100 (default), h200, b200, a100, l40s, ...: an unknown one lists all",
    )
    add("--gpus", type=int, default=8, metavar="N", help="of the run, over all nodes (8)")
    add("--price", type=float, default=2.5, help="of a GPU-hour, in any currency (2.5)")
    add("--gpus-per-node", type=int, metavar="N", help="(8, or what nodes of that kind have)")
    add("--link-gbps", type=float, metavar="GBPS", help="Gbit/s between nodes, a GPU (of the kind)")
    add("--images", type=int, metavar="N", help="training images, where data.path is not there")
    add("--classes", type=int, metavar="N", help="the same")
    add("--gpu-rates", type=Path, metavar="FILE", help="measured rates (tests/gpu/gpu_rates.json, where it is)")
    add(
        "--policies",
        choices=("own", "all"),
        default="own",
        help="all: trace and compare every checkpointing policy, a minute or three (own)",
    )
    add("--plot", type=Path, metavar="FILE", help="memory by part and cost over GPUs, as .png or .svg")
    add("--json", action="store_true", help="the plan as JSON on stdout in place of the tables")
    add("--debug", action="store_true", help="tracebacks instead of one-line errors")


def command(options: argparse.Namespace) -> int:
    """The command with its options parsed; returns the exit code."""
    from pipeline.config.kinds import load_any

    config = load_any(options.config, options.overrides)
    from pipeline.planning.rates import GB, gpu, measured

    kind = gpu(options.gpu)
    rates = measured(options.gpu_rates, kind.kind)
    # torch, timm: seconds, which a wrong name need not wait for
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from pipeline.planning import figure
    from pipeline.planning.footprint import Asked
    from pipeline.planning.plan import Planner, check_asked
    from pipeline.planning.report import as_json, print_plan

    if options.plot is not None:
        figure.check_path(options.plot)
    per_node = options.gpus_per_node if options.gpus_per_node is not None else kind.per_node
    check_asked(options.gpus, options.price, per_node, options.link_gbps, options.images, options.classes)
    link = kind.network_rate if options.link_gbps is None else options.link_gbps / 8 * GB
    asked = Asked(
        *(kind, options.gpus, options.price, per_node, link),
        images=options.images,
        classes=options.classes,
        rates=rates,
    )
    config.train.accumulation_steps(asked.gpus)
    policies: tuple[Any, ...] = ("none", "selective", "selective_mlp", "block", "stage")
    screen = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("building the model on fake tensors", total=None)
        planner = Planner(config, asked, lambda text: progress.update(task, description=text))
        plan = planner.plan(policies if options.policies == "all" else ())
    if options.plot is not None:
        figure.draw(plan, options.plot)
    if options.json:
        print(json.dumps(as_json(plan), indent=1))
    else:
        print_plan(plan, Console(width=None if Console().is_terminal else 140))
    return 0
