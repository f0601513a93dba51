"""The training recipe, taken from timm where timm has it: mixing, loss, parameter groups, schedule, EMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from pipeline.config.run import RunConfig
from pipeline.config.sections import Augment, Optimizer

# Of inputs, targets and a key. What these are, and what a net makes of them, is the task's.
Mixing = Callable[[Any, Any, tuple[int, ...]], tuple[Any, Any]]
Loss = Callable[[Any, Any], torch.Tensor]
# Gradients that DeepSpeed sends at once. The bucket is allocated at once: its default of 5e8 elements is 2 GB, more
# than HorNet-L's gradients.
REDUCE_BUCKET_ELEMENTS = 50_000_000


def seed_micro_batch(key: tuple[int, ...]) -> None:
    """Draw what follows (drop path, dropout) from the key alone: (seed, step, place in the global batch)."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def mixing_and_loss(augment: Augment, num_classes: int) -> tuple[Mixing, Loss]:
    """How a micro-batch is mixed, and the loss of logits (B, num_classes) against what mixing returns.

    The first takes images (B, 3, H, W), labels (B,) and a key; the key alone decides what is drawn, so the same
    position in training is mixed alike after a resume. Targets are (B, num_classes) where mixing is on, else (B,).
    """
    if not (augment.mixup_alpha or augment.cutmix_alpha):
        loss = LabelSmoothingCrossEntropy(augment.label_smoothing)
        return (lambda images, labels, key: (images, labels)), lambda logits, labels: loss(logits.float(), labels)
    mixup = Mixup(
        mixup_alpha=augment.mixup_alpha,
        cutmix_alpha=augment.cutmix_alpha,
        label_smoothing=augment.label_smoothing,
        num_classes=num_classes,
    )
    soft_loss = SoftTargetCrossEntropy()

    def mix(images: torch.Tensor, labels: torch.Tensor, key: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        np.random.seed(np.random.SeedSequence(key).generate_state(1))  # timm's Mixup draws from NumPy's global state
        return mixup(images, labels)

    return mix, lambda logits, targets: soft_loss(logits.float(), targets)


def parameter_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """AdamW groups: weight decay on matrices and convolutions alone, and `lr_scale` by layer with `layer_decay`.

    Source of the layers: the published fine-tuning recipe (12 layers), in the model's `group_matcher`.
    """
    if optimizer.layer_decay is None:
        return param_groups_weight_decay(model, optimizer.weight_decay)
    return param_groups_layer_decay(model, optimizer.weight_decay, layer_decay=optimizer.layer_decay)


def schedule(optimizer: Any, config: Optimizer, steps_per_epoch: int, steps: int) -> CosineLRScheduler:
    """Linear warm-up from 0 to the peak, then cosine to `lr_final` over what is left, as published.

    `step_update(step)` sets the rates for a step (they depend on nothing else), times each group's `lr_scale`.
    `optimizer` is what DeepSpeed returned: it has `param_groups`.
    """
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup_steps,
        lr_min=config.lr_final,
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def optimizer(groups: list[dict[str, Any]], config: RunConfig) -> AdamWithEma:
    """AdamW, with the EMA where the config asks for one. `groups` are those of `parameter_groups`."""
    settings = config.optimizer
    options: dict[str, Any] = {"lr": settings.lr_peak, "betas": settings.betas, "eps": settings.eps}
    return AdamWithEma(groups, ema_decay=settings.ema_decay, **options)


class AdamWithEma(torch.optim.AdamW):
    """AdamW that keeps an exponential moving average of each parameter as optimizer state `ema`.

    DeepSpeed gives the optimizer flat fp32 partitions in place of the parameters. As optimizer state the average is
    therefore sharded like the moments, in fp32, at every ZeRO stage, and costs no gather.
    """

    def __init__(self, params: Any, ema_decay: float | None, **options: Any) -> None:
        super().__init__(params, **options)
        self.ema_decay = ema_decay
        # Asked before every update. It is here because DeepSpeed knows the norm of the gradient only inside its step.
        self.may_update: Callable[[], bool] = lambda: True

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the per-parameter state tensors."""
        return ("exp_avg", "exp_avg_sq") + (("ema",) if self.ema_decay is not None else ())

    @torch.no_grad()
    def init_state(self, parameter: torch.Tensor) -> None:
        """Give `parameter` the state it has before the first step."""
        self.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        if self.ema_decay is not None:
            self.state[parameter]["ema"] = parameter.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not self.may_update():
            return
        super().step(closure)
        if self.ema_decay is None:
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["ema"].lerp_(parameter, 1 - self.ema_decay)
