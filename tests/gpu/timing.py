"""How the parts measure and report: seconds of work on the device, rows as Markdown and JSON."""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SLEEP_CYCLES = 500_000  # of the device, a repetition: a quarter of a millisecond, several launches of the host's


class Bench:
    """Where rows go, how long a part may take, and what sizes there are.

    `tiny`: the dry run, on the CPU, whose times mean nothing. `work`: a folder that the parts of a run share.
    """

    def __init__(self, args: argparse.Namespace, part: str) -> None:
        self.args, self.tiny, self.work = args, args.dry_run, Path(args.work)
        self.device = torch.device("cpu" if self.tiny else "cuda")
        self._begun, self._part = time.monotonic(), part
        self._out = open(args.file, "a", encoding="utf-8")  # noqa: SIM115
        self._peaks: dict[str, float] = {}
        if self.tiny:
            torch.set_num_threads(1)
        else:
            self.write(device=torch.cuda.get_device_name(), torch=torch.__version__)

    def heading(self, title: str, columns: str) -> None:
        print(f"\n## {title}\n\n| {columns} |\n|{'---|' * (columns.count('|') + 1)}", flush=True)

    def row(self, **fields: Any) -> None:
        cells = [f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for v in fields.values()]
        print(f"| {' | '.join(cells)} |", flush=True)
        self.write(**fields)

    def note(self, text: str) -> None:
        """What is no row of the table: on the error stream, so that the table stays one."""
        print(text, file=sys.stderr, flush=True)
        self.write(note=text)

    def write(self, **fields: Any) -> None:
        self._out.write(json.dumps({"part": self._part, **fields}) + "\n")
        self._out.flush()

    @property
    def left(self) -> float:
        """Seconds until nothing new is to begin."""
        return self.args.seconds - (time.monotonic() - self._begun)

    def late(self, what: str, share: float = 1.0) -> bool:
        """Whether that share of the part's time is over; if so, `what` is noted as left out."""
        if time.monotonic() - self._begun < share * self.args.seconds:
            return False
        self.note(f"left out for lack of time: {what}")
        return True

    def seconds(self, work: Callable[[], object], warm_up: int = 3, budget: float = 0.1, least: int = 5) -> float:
        """Median seconds of `work` on the device: events around each, as many as fit in `budget`, up to 50."""
        if self.tiny:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        for _ in range(warm_up):
            work()
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        repeats = int(min(50, max(least, budget / (time.perf_counter() - start))))
        # The host gets ahead meanwhile: else what is shorter than its launch would show the launch's time.
        torch.cuda._sleep(repeats * SLEEP_CYCLES)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
        for before, after in zip(marks[::2], marks[1::2], strict=True):
            before.record()
            work()
            after.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in zip(marks[::2], marks[1::2], strict=True)) / 1e3

    def attempt(self, work: Callable[[], object], **options: Any) -> float | str:
        """Its seconds, or why there are none: one thing that fails must not end a table."""
        try:
            return self.seconds(work, **options)
        except torch.OutOfMemoryError:
            said = "out of memory"
        except Exception as failure:
            said = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
            self.note(f"failed: {said}")
        self.clear()
        return said

    def clear(self) -> None:
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()

    def copy_bytes_s(self) -> float:
        """Bytes a second, read and written, of a copy on the device; measured once."""
        if "copy" not in self._peaks:
            a = torch.empty(2**20 if self.tiny else 2**31, dtype=torch.uint8, device=self.device)
            b = torch.empty_like(a)
            self._peaks["copy"] = 2 * a.numel() / self.seconds(lambda: b.copy_(a))
        return self._peaks["copy"]

    def gemm_flops_s(self) -> float:
        """FLOP/s of a bf16 product of 8192^3; measured once."""
        if "gemm" not in self._peaks:
            side = 64 if self.tiny else 8192
            a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
            self._peaks["gemm"] = 2 * side**3 / self.seconds(lambda: a @ b)
        return self._peaks["gemm"]
