"""Many short runs, one after the other, in the processes of one launch: importing torch costs more than a run does.

    torchrun ... tests/support/programs/many_runs.py JOBS.json

JOBS is a list of objects: "arguments", as for `python -m pipeline`; and what happens to the run, on its last rank
alone, at steps counted from 1:

    stop_at     it sends itself SIGUSR1 in that step
    kill_at     it sends itself SIGKILL in that step, once what it has saved is on disk; no job comes after it
    nan         steps whose first image is NaN
    loud        steps whose loss is a hundred times as large
    raises      the name of the error that ends the run

Each rank appends to RUN/record-RANK.jsonl, a line a step: the step, its loss and gradient norm as hexadecimal floats,
the sample ids that this rank trained on, the number of ranks. Prints "done" on rank 0.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from pipeline.__main__ import _parse
from pipeline.config.dense import SegmentConfig
from pipeline.config.detect import DetectConfig
from pipeline.config.load import Config, load
from pipeline.config.run import RunConfig
from pipeline.data.views import Batch
from pipeline.dense.segmentation import SEGMENTATION
from pipeline.detection.detection import DETECTION
from pipeline.ranks.collectives import barrier
from pipeline.ranks.lifetime import EXIT_REQUEUE, StopRequest, exclusive
from pipeline.ranks.watchdog import Watchdog
from pipeline.training import engine
from pipeline.training.classification import CLASSIFICATION
from pipeline.training.run import Run
from pipeline.training.task import Kind

TASKS: dict[str, tuple[type[RunConfig], Kind]] = {
    "segment": (SegmentConfig, SEGMENTATION),
    "detect": (DetectConfig, DETECTION),
}


def disturb_and_record(run: Run, job: dict[str, Any]) -> None:
    """Have the run write down what it does, and meet what the job has for it."""
    path = run.config.run_dir / f"record-{run.ranks.rank}.jsonl"
    last_rank = run.ranks.rank == run.ranks.count - 1
    samples: list[int] = []
    step = run.first_step  # under way, counted from 0
    feed_step, train_step, batches, place, loss = (
        *(run.feed.step, run.engine.train_step, run.feed.batches, run.place, run.loss),
    )

    def noted() -> Any:
        for batch in batches:
            samples.extend(batch.samples.tolist())
            yield batch

    def placed(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = place(batch)
        if last_rank and step + 1 in job.get("nan", ()):
            images[0] = float("nan")
        return images, labels

    def lost(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return loss(logits, targets) * (100 if last_rank and step + 1 in job.get("loud", ()) else 1)

    def fed(number: int) -> Any:
        nonlocal step
        step = number
        if last_rank and step + 1 == job.get("stop_at"):
            os.kill(os.getpid(), signal.SIGUSR1)
        if last_rank and step + 1 == job.get("kill_at"):
            run.writer.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return feed_step(number)

    def trained(*arguments: Any) -> Any:
        samples.clear()
        result = train_step(*arguments)
        line = {"step": step, "loss": result.loss.hex(), "grad_norm": float(result.grad_norm).hex()}
        line |= {"samples": samples[:], "ranks": run.ranks.count}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return result

    run.feed.batches, run.place, run.feed.place, run.loss = noted(), placed, placed, lost
    run.feed.step, run.engine.train_step = fed, trained  # type: ignore[method-assign]


def main() -> None:
    ranks, device = engine.start_ranks()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        options = _parse(job["arguments"])
        config_kind, task = TASKS.get(options.command, (Config, CLASSIFICATION))
        config: RunConfig = load(options.config, options.overrides, config_kind)
        stop, code, raised = StopRequest(), None, None
        stacks = config.run_dir / "stacks"
        watchdog = Watchdog(ranks.rank, ranks.count, config.guard.stall_seconds, stacks, stop=stop)
        try:
            with ExitStack() as stack:
                stack.enter_context(watchdog)
                if ranks.rank == 0:
                    stack.enter_context(exclusive(config.run_dir))
                barrier()
                run = Run(options.command, config, task, ranks, device, True, stack, watchdog)
                disturb_and_record(run, job)
                code = run.train()
        except ValueError as error:
            raised = f"{type(error).__name__}: {error}"
            (config.run_dir / "raised.txt").write_text(raised)
        expected = None if job.get("raises") else EXIT_REQUEUE if job.get("stop_at") else 0
        assert code == expected, (code, raised, job)
        assert (raised or "").startswith(job.get("raises") or ""), (raised, job)
        barrier()
    if ranks.rank == 0:
        print("done", flush=True)
    engine.stop_ranks()


if __name__ == "__main__":
    main()
