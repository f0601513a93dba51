"""What grows with the number of nodes, and should not: a rank's order of samples, a node's start, rank 0's checkpoint.

    python tests/bench/bench_scale.py [--parts order start checkpoint]

- order: CPU seconds of one rank for its samples of an epoch of 14.2 M, by number of ranks; 64 lanes, windows of 4.
- start: 1, 8 and 64 nodes open one manifest of 1,420 shards (sparse files, bench_start.py) in processes one after the
  other; bytes that a node reads and CPU seconds until its first rank has its first batch. Imports are not in it.
- checkpoint: one of HorNet-T with an EMA at ZeRO-1 on 1, 2 and 4 real gloo ranks: bytes that rank 0 holds for it, files
  and bytes that it writes, CPU seconds of rank 0 and of the others.

Ratios are to the first row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LANES, WINDOW, GLOBAL_BATCH = 64, 4, 4096
PRETRAIN, DEMO = ROOT / "configs" / "pretrain_hornet_l_in22k_384.yaml", ROOT / "configs" / "demo_pretrain.yaml"


def in_fork(work: Callable[[], Any]) -> Any:
    """What `work` returns in a process of its own, which has what is imported here and no caches."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, json.dumps(work()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        text = told.read()
    if os.waitpid(child, 0)[1]:
        sys.exit("a process failed, see above")
    return json.loads(text)


def bytes_read() -> int:
    """Of this process, by the system's count of what it was given."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


def order_rows() -> None:
    from pipeline.data.order import SampleOrder

    def work(ranks: int) -> dict[str, float]:
        order = SampleOrder((10_000,) * 1420, GLOBAL_BATCH, 0, LANES, WINDOW)
        rank = min(ranks - 1, 100)
        begun = time.process_time()
        images = 0
        for batch in order.micro_batches(order.steps_per_epoch, 2 * order.steps_per_epoch, rank, ranks, 8):
            images += len(batch.samples)
        epoch = time.process_time() - begun
        return {"epoch": epoch, "step": 1e6 * epoch / order.steps_per_epoch, "image": 1e6 * epoch / images}

    print("\n| ranks | CPU-s a rank and epoch | ratio | microseconds a step | microseconds an image | ratio |")
    print("|---|---|---|---|---|---|")
    first: dict[str, float] = {}
    for ranks in (1, 8, 64, 512):
        found = [in_fork(lambda ranks=ranks: work(ranks)) for _ in range(3)]
        row = {name: statistics.median(each[name] for each in found) for name in found[0]}
        first = first or row
        print(
            f"| {ranks} | {row['epoch']:.3f} | {row['epoch'] / first['epoch']:.3f} | {row['step']:.1f} "
            f"| {row['image']:.2f} | {row['image'] / first['image']:.2f} |",
            flush=True,
        )


def start_rows() -> None:
    import bench_start

    import pipeline.data.loader
    from pipeline.config.load import load
    from pipeline.data.opened import open_manifest, training_order
    from pipeline.ranks.collectives import Ranks

    with tempfile.TemporaryDirectory() as folder:
        bench_start.build(Path(folder))
        config = load(PRETRAIN, [f"data.path={folder}", "data.workers_per_rank=0", "train.micro_batch=8"])

        def node(number: int, nodes: int) -> dict[str, float]:
            before, begun = bytes_read(), time.process_time()
            manifest = open_manifest(config.data)
            order = training_order(config, manifest)
            opened, spent = bytes_read() - before, time.process_time() - begun
            ranks = Ranks(number * 8, nodes * 8)
            step = 10 * order.steps_per_epoch + 1234  # a resume
            next(pipeline.data.loader.training_batches(config, manifest, order, ranks, step, step + 1))
            whole = time.process_time() - begun
            return {"opened": opened, "cpu": spent, "read": bytes_read() - before, "whole": whole}

        print("\n| nodes | manifest: MB read by a node | CPU-s | ratio | to the first batch: MB | CPU-s | ratio |")
        print("|---|---|---|---|---|---|---|")
        first: dict[str, float] = {}
        for nodes in (1, 8, 64):
            found = [in_fork(lambda number=number, nodes=nodes: node(number, nodes)) for number in range(nodes)]
            row = {name: statistics.median(each[name] for each in found) for name in found[0]}
            first = first or row
            print(
                f"| {nodes} | {row['opened'] / 1e6:.2f} | {row['cpu']:.3f} | {row['cpu'] / first['cpu']:.2f} "
                f"| {row['read'] / 1e6:.2f} | {row['whole']:.3f} | {row['whole'] / first['whole']:.2f} |",
                flush=True,
            )


def save(folder: Path) -> list[dict[str, Any]]:
    """Two checkpoints; what each rank did for the second. A collective."""
    import torch
    from bench_zero import CLASSES, configured, engine_for, loss_of

    from pipeline.checkpoints.files import Meta
    from pipeline.checkpoints.state import CheckpointWriter
    from pipeline.ranks.collectives import barrier, gather
    from pipeline.training import engine

    ranks, device = engine.start_ranks()
    more = ("model.name=hornet_tiny_7x7", "train.micro_batch=2", f"train.global_batch={2 * ranks.count}")
    config = configured(1, *more)
    subject = engine_for(1, ranks, device, *more)
    subject.train_step(iter([(torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64))]), loss_of)
    held: list[int] = []
    full_state = subject.full_state

    def counted(state: str, everywhere: bool = False) -> dict[str, torch.Tensor]:
        found = full_state(state, everywhere)
        held.append(sum(tensor.nbytes for tensor in found.values()))
        return found

    subject.full_state = counted
    writer = CheckpointWriter(folder, config.checkpoint, ranks.rank)
    for number in (1, 2):
        held.clear()
        barrier()
        begun = time.process_time()
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
        gathered = time.process_time() - begun
        writer.wait()
        spent = time.process_time() - begun
    barrier()
    files = [path for path in (folder / "step-00000002").iterdir() if path.is_file()] if ranks.rank == 0 else []
    own = {
        "held": sum(held),
        "files": len(files),
        "written": sum(path.stat().st_size for path in files),
        "gathering": gathered,
        "cpu": spent,
    }
    everyone = gather(own)
    engine.stop_ranks()
    return everyone


def checkpoint_rows() -> None:
    print(
        "\n| ranks | MB held by rank 0 | files | MB written | CPU-s to gather | CPU-s in all | ratio | another rank's |"
    )
    print("|---|---|---|---|---|---|---|---|")
    first: dict[str, float] = {}
    for ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, __file__, "--save", folder], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            found = json.loads((Path(folder) / "found.json").read_text())
        row, others = found[0], [each["cpu"] for each in found[1:]]
        first = first or row
        print(
            f"| {ranks} | {row['held'] / 1e6:.1f} | {row['files']} | {row['written'] / 1e6:.1f} "
            f"| {row['gathering']:.2f} | {row['cpu']:.2f} | {row['cpu'] / first['cpu']:.2f} "
            f"| {f'{statistics.mean(others):.2f}' if others else ''} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"order": order_rows, "start": start_rows, "checkpoint": checkpoint_rows}
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.save is not None:
        everyone = save(options.save)
        if os.environ["RANK"] == "0":
            (options.save / "found.json").write_text(json.dumps(everyone))
        return
    for part in options.parts:
        parts[part]()


if __name__ == "__main__":
    main()
