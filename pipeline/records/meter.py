"""How fast a run is: loss, throughput, memory and waiting between two reads, and the seconds that it still takes."""

from __future__ import annotations

import math
import resource
import time
from collections import deque
from collections.abc import Callable
from itertools import accumulate

import torch

from pipeline.ranks.collectives import Ranks

Reduction = Callable[[torch.Tensor], torch.Tensor]


class Meter:
    """Loss, throughput, memory and time spent waiting for data, between two reads."""

    def __init__(
        self,
        global_batch: int,
        ranks: Ranks,
        device: torch.device,
        reduce_sum: Reduction,
        reduce_max: Reduction,
        flops_per_image: Callable[[int], float] | None,
        peak_flops: float | None,
    ) -> None:
        """`reduce_*` are all-reductions of a small float64 tensor on `device`.

        `flops_per_image` takes the side of an image in pixels and gives the FLOPs of its part of a training step,
        forward and backward; `peak_flops` is the FLOP/s of one device. Without either there is no MFU.
        """
        self.global_batch, self.ranks, self.device = global_batch, ranks, device
        self.reduce_sum, self.reduce_max = reduce_sum, reduce_max
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self._restart()

    def _restart(self) -> None:
        self._loss = self._flops = 0.0
        self._steps = self._steps_with_loss = 0
        self._waited = self._paused = 0.0
        self._since = time.monotonic()

    def add(self, loss: float, resolution: int) -> None:
        """Count a step on images of `resolution` pixels, and its loss: the mean over ranks, finite or not."""
        self._loss += loss
        self._steps_with_loss += 1
        self._count(resolution)

    def skip(self, resolution: int) -> None:
        """Count a step whose update was left out: it took its time, and its loss is no part of the mean."""
        self._count(resolution)

    def _count(self, resolution: int) -> None:
        self._steps += 1
        if self.flops_per_image is not None and self.peak_flops is not None:
            self._flops += self.global_batch * self.flops_per_image(resolution)

    def waiting(self) -> _Stopwatch:
        """Time inside counts as waiting for data."""
        return _Stopwatch(self, "_waited")

    def paused(self) -> _Stopwatch:
        """Time inside (evaluation, checkpoints) does not count for throughput."""
        return _Stopwatch(self, "_paused")

    def read(self, done: int, bad_samples: int) -> dict[str, float]:
        """What was measured since the last read. Two reductions: all ranks must call it.

        `bad_samples` is this rank's count, in the result it is the sum over ranks. `loss` is nan without a step that
        had one. `data_wait` is a share of the time, the mean over ranks; `data_wait_max` that of the slowest rank.
        `memory_gb` (10^9 bytes) is the largest of the ranks: what torch had allocated on a GPU at its peak since the
        last read, and on a CPU the process at its peak so far. `mfu` is a share of `peak_flops`, if that is known.
        """
        elapsed = max(time.monotonic() - self._since - self._paused, 1e-9)
        waited = self._waited / elapsed
        sums = torch.tensor([waited, bad_samples], dtype=torch.float64, device=self.device)
        peaks = torch.tensor([waited, _peak_memory_gb(self.device)], dtype=torch.float64, device=self.device)
        waited_sum, bad_sum = self.reduce_sum(sums).tolist()
        waited_max, memory_gb = self.reduce_max(peaks).tolist()
        metrics = {
            "loss": self._loss / self._steps_with_loss if self._steps_with_loss else math.nan,
            "samples_seen": done * self.global_batch,
            "images_per_second": self._steps * self.global_batch / elapsed,
            "data_wait": waited_sum / self.ranks.count,
            "data_wait_max": waited_max,
            "bad_samples": bad_sum,
            "memory_gb": memory_gb,
        }
        if self.flops_per_image is not None and self.peak_flops is not None:
            metrics["mfu"] = self._flops / elapsed / self.ranks.count / self.peak_flops
        self._restart()
        return metrics


class _Stopwatch:
    def __init__(self, meter: Meter, field: str) -> None:
        self.meter, self.field = meter, field

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        spent = time.monotonic() - self.started
        setattr(self.meter, self.field, getattr(self.meter, self.field) + spent)


def _peak_memory_gb(device: torch.device) -> float:
    """10^9 bytes; on a GPU the next peak is counted from now on."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class Eta:
    """Seconds that a run still takes, from its last windows of steps, of which the newest weigh most.

    Every window counts once, however many steps it had: so what a run took before it was interrupted can be added as
    one window, and is forgotten as the new machine shows its own speed. A window far slower than is typical (a
    compilation, a stalled file system) counts as `_OUTLIER` times the typical.
    """

    _WINDOWS, _HALF_LIFE, _OUTLIER = 50, 8, 3.0

    def __init__(self) -> None:
        self._seconds_per_step: deque[float] = deque(maxlen=self._WINDOWS)

    def add(self, steps: int, seconds: float) -> None:
        """A window of `steps` that took `seconds`; one without steps is no window."""
        if steps > 0:
            self._seconds_per_step.append(seconds / steps)

    def left(self, steps_left: int) -> float:
        """Seconds for `steps_left` more steps; nan before the first window."""
        if not self._seconds_per_step:
            return math.nan
        newest = len(self._seconds_per_step) - 1
        weighted = sorted(
            (seconds, 0.5 ** ((newest - i) / self._HALF_LIFE)) for i, seconds in enumerate(self._seconds_per_step)
        )
        total = sum(weight for _, weight in weighted)
        up_to = accumulate(weight for _, weight in weighted)
        median = next(seconds for (seconds, _), below in zip(weighted, up_to, strict=True) if below >= total / 2)
        bound = self._OUTLIER * median
        return steps_left * sum(min(seconds, bound) * weight for seconds, weight in weighted) / total
