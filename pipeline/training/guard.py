"""Which steps may change the weights, and how a run ends that has too many which may not.

A loss or gradient that is not finite, or a spike far above the steps before it, must not reach the weights: one such
update can undo days. The verdict is a pure function of the numbers of accepted steps, the same on all ranks; they go
into each checkpoint, so that a resumed run judges as an uninterrupted one would.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.config.sections import Guard as GuardConfig

_JUDGED_FROM_STEPS = 20  # the configuration allows no shorter window; the MAD of fewer is a matter of chance
_MAD_TO_SIGMA = 1.4826  # the standard deviation of a normal distribution, by its median absolute deviation
# The mean loss of a large batch varies by a percent or less, so a new resolution or another stretch of the schedule
# would be many deviations. 5 % makes 1.8 times the loss an ordinary step with a z_max of 16.
_LOSS_FLOOR_SHARE = 0.05
# A loss near 0 (a small set learnt by heart) varies by many times its median, and harms nothing.
_LOSS_FLOOR_NATS = 0.01
# The gradient's norm varies by tens of percent from step to step, and is clipped besides: what counts is a multiple.
_LOG_GRAD_NORM_FLOOR = 0.25
_LEAST_NORM = sys.float_info.min  # the logarithm of 0 is no number that JSON knows


class GuardError(ValueError):
    """Too many steps in a row were left out. The message says which, where they are listed and what to change."""


class GuardState(BaseModel):
    """What the verdicts depend on; as JSON a part of each checkpoint, where floats come back to the last bit.

    losses and log_grad_norms are those of the last accepted steps, oldest first. skipped: updates left out so far,
    in_a_row: of these the last ones without an accepted step between, rewinds: how often the run went back.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    losses: list[float] = []
    log_grad_norms: list[float] = []
    skipped: int = 0
    in_a_row: int = 0
    rewinds: int = 0


class Guard:
    """Judges each step by its global loss and gradient norm, before the update."""

    def __init__(self, config: GuardConfig, state: GuardState | None = None) -> None:
        state = state or GuardState()
        self.config = config
        self._losses = deque(state.losses, maxlen=config.window_steps)
        self._log_grad_norms = deque(state.log_grad_norms, maxlen=config.window_steps)
        self._skipped, self._in_a_row, self._rewinds = state.skipped, state.in_a_row, state.rewinds

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """None: the update may be made, and the step joins the window. Else why not, in a few words.

        `loss` is the mean over the global batch, `grad_norm` the L2 norm before clipping. Once a step, with the same
        numbers on all ranks. With mode "off" spikes pass; what is not finite never does (DeepSpeed leaves such an
        update out in any case).
        """
        reason = _not_finite(loss, grad_norm)
        if reason is None and self.config.mode != "off":
            reason = self._spike(loss, grad_norm)
        if reason is None:
            self._losses.append(loss)
            self._log_grad_norms.append(_log_norm(grad_norm))
            self._in_a_row = 0
        else:
            self._skipped += 1
            self._in_a_row += 1
        return reason

    @property
    def state(self) -> GuardState:
        """What to put into a checkpoint: a Guard made of it judges as this one."""
        return GuardState(
            losses=list(self._losses),
            log_grad_norms=list(self._log_grad_norms),
            skipped=self._skipped,
            in_a_row=self._in_a_row,
            rewinds=self._rewinds,
        )

    @property
    def exhausted(self) -> bool:
        """Whether guard.steps_in_a_row steps were left out one after the other: leaving out more will not help."""
        return self._in_a_row >= self.config.steps_in_a_row

    def forget(self) -> None:
        """Empty the window, because the steps to come are not like those in it; the counts stay."""
        self._losses.clear()
        self._log_grad_norms.clear()

    def rewound(self) -> None:
        """The run went back to earlier weights."""
        self._rewinds += 1
        self._in_a_row = 0
        self.forget()

    def _spike(self, loss: float, grad_norm: float) -> str | None:
        steps = len(self._losses)
        if steps < _JUDGED_FROM_STEPS:
            return None
        z, median = _robust_z(loss, self._losses, _LOSS_FLOOR_NATS, _LOSS_FLOOR_SHARE)
        if z > self.config.z_max:
            return f"loss {loss:.4g} is {z:.4g} robust deviations above the median {median:.4g} of {steps} steps"
        z, median = _robust_z(_log_norm(grad_norm), self._log_grad_norms, _LOG_GRAD_NORM_FLOOR)
        if z > self.config.z_max:
            return (
                f"gradient norm {grad_norm:.4g} is {z:.4g} robust deviations (of its logarithm) above the median "
                f"{math.exp(median):.4g} of {steps} steps"
            )
        return None


def explain_end(
    config: GuardConfig, state: GuardState, step: int, reason: str, ledger: Path, weights: Path | None
) -> str:
    """The text of the GuardError that ends a run at `step`, left out because of `reason`: one line.

    `weights` is the checkpoint to start another run from, None where there is none yet.
    """
    after = f" after {state.rewinds} rewinds (guard.rewinds_max {config.rewinds_max})" if state.rewinds else ""
    start = f"init.checkpoint={weights} init.weights=model " if weights else ""
    same = "guard.mode=rewind" if config.mode != "rewind" else "a higher guard.rewinds_max"
    if "not finite" not in reason:
        same += f", or a guard.z_max above {config.z_max:g} if these are no spikes"
    return (
        f"{state.in_a_row} steps in a row were left out{after}, the last at step {step}: {reason}; {ledger} lists "
        f"them. The same command would meet them again: go on with {same}; or start another run"
        f"{' from the last good weights' * bool(start)} with a lower rate or another order of the data, for example "
        f"name=second {start}optimizer.lr_peak=... seed=..."
    )


def _not_finite(loss: float, grad_norm: float) -> str | None:
    if not math.isfinite(loss):
        return f"loss {loss} is not finite"
    # DeepSpeed has a norm of -1 stand for one that is not finite, in places.
    if not math.isfinite(grad_norm) or grad_norm < 0:
        return f"gradient norm {grad_norm} is not finite"
    return None


def _log_norm(grad_norm: float) -> float:
    return math.log(max(grad_norm, _LEAST_NORM))


def _robust_z(x: float, window: Iterable[float], floor: float, floor_share: float = 0.0) -> tuple[float, float]:
    """(z, median): how many robust standard deviations of the window `x` lies above its median."""
    values = np.array([*window])
    median = float(np.median(values))
    mad = float(np.median(np.abs(values - median)))
    return (x - median) / max(_MAD_TO_SIGMA * mad, floor, floor_share * abs(median)), median
