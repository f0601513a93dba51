"""Which sample stands at which position of training: a pure function of (seed, epoch, position).

Position p of an epoch belongs to optimizer step p // global_batch. Rank r of R takes the r-th of R equal slices of each
global batch, so the samples of a step are the same for every number of ranks, of workers, and for both file formats.
The state of the data is therefore one integer: the number of optimizer steps done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class SampleOrder:
    """The order of `samples` training samples in global batches of `global_batch`, shuffled anew each epoch.

    The last samples % global_batch positions of each epoch's permutation are left out of that epoch.
    Raises ValueError if there are fewer samples than one global batch holds.
    """

    samples: int
    global_batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples < self.global_batch:
            raise ValueError(
                f"{self.samples} training samples do not fill one global batch of {self.global_batch}; "
                f"lower train.global_batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch

    def permutation(self, epoch: int) -> np.ndarray:
        """Sample ids by position, int64 (samples,)."""
        return _permutation(self.samples, self.seed, epoch)

    def rank_steps(self, epoch: int, first_step: int, rank: int, ranks: int) -> np.ndarray:
        """One rank's sample ids, int64 (steps, global_batch // ranks), from step `first_step` of `epoch` to its end."""
        steps = self.permutation(epoch)[: self.steps_per_epoch * self.global_batch]
        return steps.reshape(self.steps_per_epoch, ranks, -1)[first_step:, rank]

    def micro_batches(
        self, first_step: int, last_step: int, rank: int, ranks: int, micro_batch: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, sample ids (micro_batch,)) of one rank, for the run's steps first_step .. last_step - 1."""
        step = first_step
        while step < last_step:
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            for ids in self.rank_steps(epoch, step_in_epoch, rank, ranks)[: last_step - step]:
                for start in range(0, len(ids), micro_batch):
                    yield epoch, ids[start : start + micro_batch]
                step += 1


@lru_cache(maxsize=2)  # the epoch under way and the one that workers have begun to prefetch
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    # Philox is counter-based: (seed, epoch) is its key, so (3, 1) and (4, 0) are unrelated streams.
    permutation = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)
    permutation.flags.writeable = False
    return permutation
