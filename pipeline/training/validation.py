"""The validation split, measured on when the configuration asks for it: once, however often a run restarts."""

from __future__ import annotations

import math

from torch import nn

from pipeline.checkpoints.files import Meta
from pipeline.config.run import RunConfig
from pipeline.training.engine import Engine
from pipeline.training.task import EvaluationStopped, Judging, Task


class Validation:
    """What a run knows of how good it is: the newest `metrics`, measured at `step`, and whether they are its best."""

    def __init__(self, config: RunConfig, task: Task, steps: int, steps_per_epoch: int, meta: Meta | None) -> None:
        """`meta` is that of the checkpoint which the run goes on from."""
        self.config, self.task, self.steps, self.steps_per_epoch = config, task, steps, steps_per_epoch
        self.metrics: dict[str, float] = dict(meta.metrics) if meta else {}
        self.step = meta.metrics_step if meta else None
        self.is_best = False

    def is_due(self, done: int) -> bool:
        """Whether to measure after `done` steps. Also where a run goes on: its last try may have been stopped there."""
        every = self.config.evaluate.every_epochs
        if every is None:
            return False
        epochs, rest = divmod(done, self.steps_per_epoch)
        due = done == self.steps or (done > 0 and rest == 0 and epochs % every == 0)
        return due and self.step != done

    def measure(self, done: int, engine: Engine, twin: nn.Module, judging: Judging) -> bool:
        """Of the EMA where there is one (and the score of the raw weights, as `top1_model`), else of the weights.

        `twin` is a replica that takes the full weights. A collective. Returns False, and leaves all as it was, where
        some rank was asked to stop meanwhile.
        """
        results = {}
        try:
            for state in ("model", *(["ema"] if "ema" in engine.state_names else [])):
                judging.watchdog.tick("gathering weights to evaluate")
                twin.load_state_dict(engine.full_state(state, everywhere=True))
                results[state] = self.task.measure(twin.to(judging.device), judging)
        except EvaluationStopped:
            return False
        finally:
            twin.to("cpu")
        self.step = done
        metrics = dict(results["model"])
        if "ema" in results:
            score = self.task.score
            metrics = {**results["ema"], f"{score}_model": results["model"][score]}
        self.metrics = self._with_best(metrics)
        return True

    def _with_best(self, metrics: dict[str, float]) -> dict[str, float]:
        name = self.config.checkpoint.best_metric
        if name is None:
            return metrics
        key, value = f"best_{name}", metrics[name]
        before = self.metrics.get(key)
        sign = -1 if name == "val_loss" else 1
        self.is_best = math.isfinite(value) and (before is None or sign * value > sign * before)
        best = value if self.is_best else before
        return metrics if best is None else {**metrics, key: best}
