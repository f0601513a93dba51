"""What a plan is of: the net, loss and targets of a configuration, of whichever task, and what else differs by task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.dense import SegmentConfig
from pipeline.config.load import Config
from pipeline.config.run import RunConfig
from pipeline.config.sections import Checkpointing, ConfigError
from pipeline.dense.segmentor import Segmentor, segmentation_loss
from pipeline.models.build import build_model
from pipeline.models.hornet import HorNet
from pipeline.records.flops import PASSES, training_flops_per_image
from pipeline.training.recipe import mixing_and_loss

Policy = Checkpointing | tuple[Checkpointing, ...]


class Subject(Protocol):
    """Of so many classes; made by `subject_of`."""

    @property
    def side(self) -> int:
        """Of the largest training images, pixels."""

    @property
    def multiple(self) -> int:
        """Micro-batches are multiples of it."""

    @property
    def bytes_per_value(self) -> int:
        """Of an image on the device."""

    def net(self, policy: Policy) -> nn.Module:
        """The net, with drop path off."""

    def backbone(self, net: nn.Module) -> HorNet:
        """The part of it that has the blocks."""

    def targets(self, batch: int) -> Tensor:
        """As the loss takes them."""

    def loss(self) -> Callable[[Any, Tensor], Tensor]:
        """Of what the net returns and the targets."""

    def side_at(self, epoch: int) -> int:
        """Of training images in `epoch`, pixels."""

    def training_flops(self) -> float:
        """Of an image of the largest side, nothing recomputed."""


@dataclass(frozen=True)
class _Classifier:
    config: Config
    classes: int

    @property
    def side(self) -> int:
        return self.config.data.largest_resolution

    @property
    def multiple(self) -> int:
        return 2 if self._mixes else 1  # mixup and cutmix pair images

    @property
    def bytes_per_value(self) -> int:
        return 5 if self.config.augment.where == "device" else 4  # fp32, and before that bytes

    @property
    def _mixes(self) -> bool:
        return bool(self.config.augment.mixup_alpha or self.config.augment.cutmix_alpha)

    def net(self, policy: Policy) -> nn.Module:
        model = self.config.model.model_copy(update={"checkpointing": policy, "drop_path_rate": 0.0})
        return build_model(model, self.classes, self.side)

    def backbone(self, net: nn.Module) -> HorNet:
        assert isinstance(net, HorNet)
        return net

    def targets(self, batch: int) -> Tensor:
        return torch.empty(batch, self.classes) if self._mixes else torch.zeros(batch, dtype=torch.int64)

    def loss(self) -> Callable[[Any, Tensor], Tensor]:
        return mixing_and_loss(self.config.augment, self.classes)[1]

    def side_at(self, epoch: int) -> int:
        return self.config.data.resolution_at(epoch)

    def training_flops(self) -> float:
        return training_flops_per_image(self.config.model, self.classes, self.side)


@dataclass(frozen=True)
class _Segmentation:
    config: SegmentConfig
    classes: int
    multiple = 1
    bytes_per_value = 5  # fp32, and before that bytes

    @property
    def side(self) -> int:
        return self.config.data.resolution

    def net(self, policy: Policy) -> nn.Module:
        model = self.config.model.model_copy(update={"checkpointing": policy, "drop_path_rate": 0.0})
        return Segmentor(model, self.classes, self.side)

    def backbone(self, net: nn.Module) -> HorNet:
        assert isinstance(net, Segmentor)
        return net.backbone

    def targets(self, batch: int) -> Tensor:
        return torch.zeros(batch, self.side, self.side, dtype=torch.int64)

    def loss(self) -> Callable[[Any, Tensor], Tensor]:
        return segmentation_loss(self.config.model, self.classes)

    def side_at(self, epoch: int) -> int:
        return self.side

    def training_flops(self) -> float:
        with torch.device("meta"):
            net, image = self.net(self.config.model.checkpointing), torch.empty(1, 3, self.side, self.side)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.train()(image)
        return PASSES * float(counter.get_total_flops())


def subject_of(config: RunConfig, classes: int) -> Subject:
    """Raises ConfigError for a task whose passes have no shapes of their own to be traced."""
    if isinstance(config, Config):
        return _Classifier(config, classes)
    if isinstance(config, SegmentConfig) and config.model.head in ("uper", "gn-uper"):
        return _Segmentation(config, classes)
    raise ConfigError(
        f"{config.name} cannot be planned: what its head {config.model.head} computes hangs on the objects in the "
        f"images; measure the memory of a few steps with train.epochs=1"
    )
