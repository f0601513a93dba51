"""What a run learns, apart from how it is run: its data and their order, net and start weights, loss, and measure.

`run.py` trains any task. Classification is the first (classification.py); pipeline/dense/ has others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from pipeline.data.mixture import TrainingOrder
from pipeline.data.views import BadSample
from pipeline.models.hornet import HorNet
from pipeline.ranks.collectives import Ranks
from pipeline.ranks.lifetime import StopRequest
from pipeline.ranks.watchdog import Watchdog
from pipeline.records.family import DataSet
from pipeline.training.recipe import Loss, Mixing

Place = Callable[[Any], tuple[Any, Any]]  # a batch -> inputs of the net, targets of the loss


class Batch(Protocol):
    """What the run asks of a micro-batch, whatever is in it: the sample ids, int64 (B,), and those that others stand in
    for.
    """

    @property
    def samples(self) -> torch.Tensor: ...

    @property
    def bad(self) -> tuple[BadSample, ...]: ...


def images_of(inputs: Any) -> torch.Tensor:
    """The images (B, 3, H, W) among the inputs of a net, which are all of them, or have them as `images`."""
    return inputs if isinstance(inputs, torch.Tensor) else inputs.images


class EvaluationStopped(Exception):
    """Some rank was asked to stop in the middle of an evaluation: all ranks leave it, and do it again when resumed."""


class Start(NamedTuple):
    """Weights that a net was given: where they came from, in words, and the classes that their head knew nothing of;
    None where no head was wanted.
    """

    origin: str
    unmatched: list[str] | None


class Judging(NamedTuple):
    """What an evaluation takes part in: who measures, where, and who may ask it to stop."""

    ranks: Ranks
    device: torch.device
    bf16: bool
    stop: StopRequest
    watchdog: Watchdog


class Task(Protocol):
    """One for each run and rank, made by `Kind`.

    data: the data set; class_names: of its labels, in their order; order: which sample when; mix, loss: see recipe.py;
    score: the metric that stands for a net where one has to.
    """

    class_names: list[str]
    order: TrainingOrder
    mix: Mixing
    loss: Loss
    score: str

    @property
    def data(self) -> DataSet: ...

    def net(self) -> nn.Module:
        """A new net, with weights drawn from torch's random state."""

    def backbone(self, net: nn.Module) -> HorNet:
        """The part of a net whose blocks are compiled, and looked into where a step goes wrong."""

    def start(self, net: nn.Module, command: str) -> Start:
        """Give a net the weights that `init.checkpoint` names. Raises CheckpointError."""

    def place(self, device: torch.device) -> Place:
        """What brings the inputs and targets of a batch to the device; `images_of` finds the images there."""

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This rank's micro-batches of the run's steps first_step .. last_step - 1. Raises DataError."""

    def again(self, step: int) -> Generator[Batch, None, None]:
        """Those of one step, read in this process. Raises DataError."""

    def resolution_at(self, epoch: int) -> int:
        """The side of training images, pixels."""

    def flops_per_image(self, resolution: int) -> float:
        """Of a training step, nothing recomputed."""

    def measure(self, net: nn.Module, judging: Judging) -> dict[str, float]:
        """`score` and other metrics of a net over the validation split, each image once. A collective.

        Raises EvaluationStopped on all ranks where one was asked to stop.
        """

    def described(self, parameters: int) -> dict[str, str]:
        """Rows of the table at the start: model, data, validation."""

    def evaluation_line(self, done: int, metrics: Mapping[str, float]) -> str:
        """What the console shows of an evaluation."""


class Kind(NamedTuple):
    """What makes the task of a run.

    prepare: what is to be done once, by rank 0, before the data can be opened; it may take hours. make: a collective;
    raises ConfigError, ManifestError or DataError. Both get the run's configuration.
    """

    prepare: Callable[[Any], None]
    make: Callable[[Any, Ranks], Task]
