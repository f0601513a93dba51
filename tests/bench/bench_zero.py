"""What surviving costs: step time by ZeRO stage against plain torch DDP, memory by stage, the stall of a checkpoint.

    python tests/bench/bench_zero.py [--rounds 7] [--steps 4]

Two gloo ranks on the CPU. Step time: the demo's model, batch and optimizer (AdamW with EMA, clipped), DDP and every
stage taking turns; medians and ratios of the same rounds. Memory: HorNet-T, a process group a stage: bytes of optimizer
state that a rank holds, of all its tensors at the update, and its peak resident memory. Checkpoint: how long
`CheckpointWriter.save` holds up training, against a step, and DeepSpeed's own `save_checkpoint` of the same engine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
Batch = tuple[torch.Tensor, torch.Tensor]
CLASSES = 50


def configured(stage: int, *more: str) -> Any:
    from pipeline.config.load import load

    return load(ROOT / "configs" / "demo_pretrain.yaml", [f"train.zero_stage={stage}", *more])


def engine_for(stage: int, ranks: Any, device: torch.device, *more: str) -> Any:
    from pipeline.models.build import build_model
    from pipeline.training import engine
    from pipeline.training.recipe import optimizer, parameter_groups

    config = configured(stage, *more)
    torch.manual_seed(0)
    model = build_model(config.model, CLASSES, config.data.resolution)
    return engine.Engine(config, model, optimizer(parameter_groups(model, config.optimizer), config), ranks, device)


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels)


def ddp_step(batch: Batch) -> Callable[[], None]:
    """The plain loop that people write."""
    from pipeline.models.build import build_model
    from pipeline.training.recipe import optimizer, parameter_groups

    config = configured(1)
    torch.manual_seed(0)
    model = build_model(config.model, CLASSES, config.data.resolution).train()
    adamw = optimizer(parameter_groups(model, config.optimizer), config)
    for parameter in model.parameters():
        adamw.init_state(parameter)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)

    def step() -> None:
        loss_of(wrapped(batch[0]), batch[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad_norm)
        adamw.step()
        adamw.zero_grad()

    return step


def time_steps(ranks: Any, device: torch.device, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step, a figure a round, by variant."""
    config = configured(1)
    generator = torch.Generator().manual_seed(ranks.rank)
    images = torch.randn(config.train.micro_batch, 3, *(2 * [config.data.resolution]), generator=generator)
    batch = (images, torch.randint(CLASSES, (len(images),), generator=generator))
    linear = F.linear  # DeepSpeed's stage 3 puts its own in its place, for everybody
    variants: dict[str, Callable[[], Any]] = {"DDP": ddp_step(batch)}
    for stage in range(4):
        subject = engine_for(stage, ranks, device)
        variants[f"ZeRO-{stage}"] = lambda subject=subject: subject.train_step(iter([batch]), loss_of)
    linears = dict.fromkeys(variants, linear) | {"ZeRO-3": F.linear}
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):  # the first warms up
        for name, step in variants.items():
            torch.nn.functional.linear = linears[name]
            torch.distributed.barrier()
            started = time.perf_counter()
            for _ in range(steps):
                step()
            if number:
                taken[name].append((time.perf_counter() - started) / steps)
    return taken


def memory(ranks: Any, device: torch.device, stage: int) -> dict[str, float]:
    """MB that this rank holds after some steps of HorNet-T, by what they are for."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    subject = engine_for(
        stage, ranks, device, "model.name=hornet_tiny_7x7", "train.micro_batch=2", "train.global_batch=4"
    )
    batch = (torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64))
    alive: list[float] = []

    def count() -> bool:
        """Asked (whether to stop) when the gradients are reduced and nothing is updated yet."""
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        alive.append(sum(storages.values()) / 1e6)
        return False

    for _ in range(3):
        subject.train_step(iter([batch]), loss_of, stop=count)
    states = [s for state in subject._inner.state.values() for s in state.values()]
    master = [] if stage == 0 else subject._flat_partitions()
    held = sum(t.untyped_storage().nbytes() for t in [*states, *master])
    return {
        "optimizer and EMA": held / 1e6,
        "all tensors": alive[-1],
        "peak resident above imports": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before,
    }


def checkpoints(ranks: Any, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds that training stands still for a checkpoint, ours and DeepSpeed's, and seconds of a step; HorNet-T."""
    from pipeline.checkpoints.files import Meta
    from pipeline.checkpoints.state import CheckpointWriter
    from pipeline.ranks.collectives import from_rank_0

    config = configured(1, "model.name=hornet_tiny_7x7", "train.micro_batch=8", "train.global_batch=16")
    subject = engine_for(1, ranks, device, "model.name=hornet_tiny_7x7", "train.micro_batch=8", "train.global_batch=16")
    batch = (torch.randn(8, 3, 64, 64), torch.zeros(8, dtype=torch.int64))
    taken: dict[str, list[float]] = {"step": [], "step while writing": [], "stall, ours": [], "stall, DeepSpeed's": []}
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(from_rank_0(folder))
        writer = CheckpointWriter(shared / "ours", config.checkpoint, ranks.rank)

        def step(name: str) -> None:
            started = time.perf_counter()
            subject.train_step(iter([batch]), loss_of)
            taken[name].append(time.perf_counter() - started)

        for number in range(1, rounds + 2):
            step("step")
            meta = Meta(
                step=number,
                samples_seen=0,
                updates=number,
                seconds=0.0,
                num_classes=CLASSES,
                synsets=[],
                dataset_id="",
                metrics={},
                config=config.model_dump(mode="json"),
            )
            writer.save(subject, meta)
            taken["stall, ours"].append(writer.stall_seconds)
            step("step while writing")
            writer.wait()
            torch.distributed.barrier()
            started = time.perf_counter()
            subject.engine.save_checkpoint(str(shared / "theirs"), tag=str(number), save_latest=False)
            taken["stall, DeepSpeed's"].append(time.perf_counter() - started)
        torch.distributed.barrier()
    return {name: values[1:] for name, values in taken.items()}  # the first warms up


def launch(*arguments: str) -> Any:
    """One part of this file on two ranks; what rank 0 found."""
    with tempfile.NamedTemporaryFile() as result:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--result", result.name, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return json.loads(Path(result.name).read_text())


def report(options: argparse.Namespace) -> None:
    taken = launch("--part", "time", "--rounds", str(options.rounds), "--steps", str(options.steps))
    print("| variant | ms a step | times DDP |\n|---|---|---|")
    for name, values in taken.items():
        ratios = [mine / ddp for mine, ddp in zip(values, taken["DDP"], strict=True)]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"| {name} | {1e3 * statistics.median(values):.0f} | {statistics.median(ratios):.2f} ({spread}) |")
    print(
        "\n| ZeRO stage | optimizer and EMA, MB a rank | times stage 0 | all tensors at the update | times stage 0 "
        "| peak resident above imports |\n|---|---|---|---|---|---|"
    )
    held = [launch("--part", "memory", "--stage", str(stage)) for stage in range(4)]
    for stage, found in enumerate(held):
        cells = [f"{found[key]:.0f} | {found[key] / held[0][key]:.2f}" for key in ("optimizer and EMA", "all tensors")]
        print(f"| {stage} | {' | '.join(cells)} | {found['peak resident above imports']:.0f} |")
    taken = launch("--part", "checkpoint", "--rounds", str(options.rounds))
    middle = {name: statistics.median(values) for name, values in taken.items()}
    print("\n| checkpoint of HorNet-T, ZeRO-1 | ms | times a step |\n|---|---|---|")
    for name, seconds in middle.items():
        print(f"| {name} | {1e3 * seconds:.0f} | {seconds / middle['step']:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="a round, of each variant")
    for name in ("--part", "--stage", "--result"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is None:
        report(options)
        return
    from pipeline.training import engine

    ranks, device = engine.start_ranks()
    found: Any = None
    if options.part == "time":
        found = time_steps(ranks, device, options.rounds, options.steps)
    elif options.part == "memory":
        found = memory(ranks, device, int(options.stage))
    else:
        found = checkpoints(ranks, device, options.rounds)
    if ranks.rank == 0:
        Path(options.result).write_text(json.dumps(found))
    engine.stop_ranks()


if __name__ == "__main__":
    main()
