"""The run, top to bottom, of any task: pretraining and fine-tuning are the same code with another configuration."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from typing import Any

import torch

from pipeline.checkpoints.choice import newest_of_run
from pipeline.checkpoints.files import CheckpointError, Meta, find_rewind, step_folders
from pipeline.checkpoints.state import CheckpointWriter, read_optimizer, read_tensors
from pipeline.config.run import RunConfig
from pipeline.data.views import BadSampleLedger, check_bad_samples
from pipeline.ranks.collectives import Ranks, barrier, from_rank_0, gather, max_over_ranks, sum_over_ranks
from pipeline.ranks.lifetime import (
    EXIT_REQUEUE,
    StopRequest,
    exclusive,
    heed_launch,
    heed_stop_file,
    leave_with_launcher,
)
from pipeline.ranks.peers import is_lost_peer
from pipeline.ranks.rendezvous import meet
from pipeline.ranks.watchdog import Watchdog
from pipeline.records.console import interrupted_line, print_plan, step_line
from pipeline.records.flops import peak_flops
from pipeline.records.meter import Eta, Meter
from pipeline.records.tracking import Tracker
from pipeline.training import engine, record
from pipeline.training.diagnose import diagnose, incident, incident_line
from pipeline.training.feed import Feed
from pipeline.training.guard import Guard, GuardError, GuardState, explain_end
from pipeline.training.initial import fetch
from pipeline.training.recipe import optimizer, parameter_groups, schedule
from pipeline.training.task import Judging, Kind
from pipeline.training.validation import Validation

BAD_SAMPLES, STACKS, CHECKPOINTS = "bad_samples", "stacks", "checkpoints"
_DIAGNOSED_IN_A_ROW = 5  # steps left out that are looked into, of each row; the ledger names the others too


def main(command: str, config: RunConfig, kind: Kind, resume: bool, stop: StopRequest) -> int:
    """Run `command` (pretrain, adapt, finetune, segment, detect) on the ranks that the launcher started, from its
    newest checkpoint if it has one. `kind` makes its task.

    Returns 0, or EXIT_REQUEUE where the run was asked to stop and the same command goes on with it. Raises ConfigError,
    ManifestError, DataError, CheckpointError, GuardError, RendezvousError or RunBusyError for what a user can mend,
    LostPeerError where another rank is gone, and Terminated where the ranks were asked to stop before they began.
    """
    leave_with_launcher(stop)
    if os.environ.get("RANK") == "0":
        heed_launch(config.run_dir, stop)
    meeting = meet(config.flat(), stop)
    stall, stacks = config.guard.stall_seconds, config.run_dir / STACKS
    watchdog = Watchdog(meeting.rank, meeting.count, stall, stacks, hosts=meeting.hosts, stop=stop)
    with ExitStack() as stack:
        stack.enter_context(watchdog)
        try:
            ranks, device = engine.start_ranks(meeting.store)
            if ranks.rank == 0:
                stack.enter_context(exclusive(config.run_dir))
                heed_stop_file(config.run_dir, stop)
                with watchdog.busy("indexing the tars"):
                    kind.prepare(config)
                if not step_folders(config.run_dir / CHECKPOINTS):
                    with watchdog.busy("fetching the weights to start from"):
                        fetch(config)
            barrier()
            code = Run(command, config, kind, ranks, device, resume, stack, watchdog).train()
        except RuntimeError as error:
            if meeting.count > 1 and is_lost_peer(error):
                watchdog.mourn(error)  # returns where nobody is
            raise
    # Not after an error: the other ranks are then still inside a collective, and leaving it in order would hang.
    engine.stop_ranks()
    return code


class Run:
    """One run on this rank: made whole from its newest checkpoint, or from the start, and then trained to its end."""

    def __init__(
        self,
        command: str,
        config: RunConfig,
        kind: Kind,
        ranks: Ranks,
        device: torch.device,
        resume: bool,
        stack: ExitStack,
        watchdog: Watchdog,
    ) -> None:
        """On `stack` goes what has to be closed or told when the run fails; `watchdog` watches from now on."""
        self.command, self.config, self.ranks, self.device = command, config, ranks, device
        assert watchdog.stop is not None
        self.watchdog, self.stop = watchdog, watchdog.stop
        self.task = task = kind.make(config, ranks)
        self.order = task.order
        self.steps = self.order.steps_per_epoch * config.train.epochs

        # Weights: the run's own newest checkpoint, else the configured start, else random.
        torch.manual_seed(config.seed)
        model = task.net()
        self.twin = task.net()  # full weights, to look at
        # Rank 0 chooses: on a network file system, hosts may for a while see different listings.
        last, meta = from_rank_0(self._newest(resume) if ranks.rank == 0 else None)
        origin, unmatched = "random weights", None
        if last is not None:
            model.load_state_dict(read_tensors(last / "model.safetensors"))
            origin = f"resumed from {last}"
        elif config.init.checkpoint is not None:
            origin, unmatched = task.start(model, command)
        if config.model.compile:
            task.backbone(model).compile_blocks()
        self.first_step = meta.step if meta else 0
        self.seconds_before = meta.seconds if meta else 0.0
        self.validation = Validation(config, task, self.steps, self.order.steps_per_epoch, meta)

        adamw = optimizer(parameter_groups(model, config.optimizer), config)
        self.engine = engine.Engine(config, model, adamw, ranks, device)
        if last is not None:
            self.engine.load_state(read_optimizer(last), meta.updates)
        self.rates = schedule(self.engine.optimizer, config.optimizer, self.order.steps_per_epoch, self.steps)
        self.loss = task.loss

        # What watches over it.
        self.guard = Guard(config.guard, GuardState.model_validate(meta.guard) if meta else None)
        self.writer = CheckpointWriter(config.run_dir / CHECKPOINTS, config.checkpoint, ranks.rank)
        stack.push(self.writer.finish)
        self.tracker: Tracker | None = None
        if ranks.rank == 0:
            self.tracker, self.ledger = record.begin(
                command, config, task.data, self.first_step, origin, watchdog.hosts, stack
            )
            if unmatched is not None:
                record.write_unmatched(config.run_dir, unmatched)
            where = f"{device.type}, {'bf16 autocast' if self.engine.bf16 else 'fp32'}"
            subject = task.described(self.engine.parameters)
            print_plan(command, config, subject, self.steps, ranks.count, where, origin)
            if last is not None:
                self.tracker.event(self.first_step, f"RESUMED from {last.name} on {ranks.count} ranks")
        self.nodes = record.Nodes(ranks, watchdog.hosts, config.run_dir, stack)
        self.bad_samples = BadSampleLedger(
            config.run_dir / BAD_SAMPLES, ranks.rank, self.first_step, self.first_step // self.order.steps_per_epoch
        )
        barrier()
        watchdog.on_stall = self.tracker.fail_from_thread if self.tracker else None
        stack.push(watchdog)  # the others are told of a failure before anything else that has to be closed is

        peak = peak_flops(device, self.engine.bf16)
        flops = task.flops_per_image if peak else None
        self.meter = Meter(config.train.global_batch, ranks, device, sum_over_ranks, max_over_ranks, flops, peak)
        self.eta = Eta()
        if self.first_step:
            self.eta.add(self.first_step, self.seconds_before)
        self._timed = (self.first_step, self.seconds_before)
        batches = task.batches(self.first_step, self.steps)
        self.place = task.place(device)
        self.feed = Feed(config, ranks, batches, self.place, task.mix, self.bad_samples, self.meter, self.watchdog)
        self.started = time.monotonic()

    def train(self) -> int:
        """Every step that is left, evaluations and checkpoints among them; returns the exit code."""
        config, per_epoch = self.config, self.order.steps_per_epoch
        self.watchdog.begin()
        if self.validation.is_due(self.first_step):  # the last try was stopped before or in it
            if not self._evaluate(self.first_step):
                return self._stopped(self.first_step)
            self._save(self.first_step)
        for step in range(self.first_step, self.steps):
            done, epoch = step + 1, step // per_epoch
            resolution = self.task.resolution_at(epoch)
            if step % per_epoch == 0 and epoch and resolution != self.task.resolution_at(epoch - 1):
                self.guard.forget()  # losses at another resolution are other losses
            self.rates.step_update(step)
            self.bad_samples.begin(epoch)
            micro_batches = self.feed.step(step)
            if step == self.first_step and self.tracker:
                micro_batches = record.with_sheet(micro_batches, config.run_dir, self.tracker)
            result = self.engine.train_step(micro_batches, self.loss, self.guard.judge, lambda: self.stop.requested)
            if self.tracker:
                self.tracker.start()  # not before: importing mlflow would hold the first step up
            rewound = False
            if result.refused is None:
                self.meter.add(result.loss, resolution)
            else:
                self.meter.skip(resolution)
                self._look_into(step, result)
                if self.guard.exhausted:
                    self._rewind(done, result.refused)
                    rewound = True

            epoch_ends = done % per_epoch == 0
            if done % config.tracking.log_every_steps == 0 or epoch_ends or done == self.steps or result.stop:
                self._log(done, result.grad_norm)
            stopped, better = result.stop, False
            if not stopped and self.validation.is_due(done):
                stopped = not self._evaluate(done)
                better = not stopped and self.validation.is_best
            if done % config.checkpoint.every_steps == 0 or done == self.steps or stopped or rewound or better:
                self._save(done)
            if stopped:
                return self._stopped(done)
        return self._finished()

    def _newest(self, resume: bool) -> Any:
        return newest_of_run(self.config, self.task.data.dataset_id, resume, quarantine=True)

    def _log(self, done: int, grad_norm: float) -> None:
        logged = self.meter.read(done, self.bad_samples.count)
        logged["epoch"] = done / self.order.steps_per_epoch
        logged["lr"] = max(group["lr"] for group in self.engine.optimizer.param_groups)
        logged["grad_norm"] = grad_norm
        if self.config.optimizer.ema_decay is not None:
            logged["ema_decay"] = self.config.optimizer.ema_decay
        guard = self.guard.state
        logged |= {"skipped_steps": guard.skipped, "guard_in_a_row": guard.in_a_row, "rewinds": guard.rewinds}
        logged |= {"checkpoints_failed": self.writer.failed, "checkpoint_stall": self.writer.stall_seconds}
        steps_before, seconds_before = self._timed
        self._timed = (done, self._seconds)
        self.eta.add(done - steps_before, self._seconds - seconds_before)
        if self.tracker:
            self.tracker.log(done, logged, step_line(done, self.steps, logged, self.eta.left(self.steps - done)))
        busy = self.nodes.gather()
        if self.tracker:
            self.tracker.log_system(done, busy)
        check_bad_samples(int(logged["bad_samples"]), self.config.data, self.config.run_dir / BAD_SAMPLES)

    @property
    def _seconds(self) -> float:
        """What the run has taken so far, in all its tries."""
        return self.seconds_before + time.monotonic() - self.started

    def _evaluate(self, done: int) -> bool:
        """Returns False where some rank was asked to stop meanwhile: it is done again when the run goes on."""
        with self.meter.paused():
            judging = Judging(self.ranks, self.device, self.engine.bf16, self.stop, self.watchdog)
            measured = self.validation.measure(done, self.engine, self.twin, judging)
        if measured and self.tracker:
            metrics = self.validation.metrics
            self.tracker.log(done, metrics, self.task.evaluation_line(done, metrics))
        return measured

    def _save(self, done: int) -> None:
        self.watchdog.tick("gathering a checkpoint")
        guard = self.guard.state
        with self.meter.paused():
            meta = Meta(
                step=done,
                samples_seen=done * self.config.train.global_batch,
                updates=self.engine.updates,
                seconds=self._seconds,
                num_classes=self.task.data.num_classes,
                synsets=self.task.class_names,
                dataset_id=self.task.data.dataset_id,
                metrics=self.validation.metrics,
                metrics_step=self.validation.step,
                guard=guard.model_dump(),
                config=self.config.model_dump(mode="json"),
            )
            self.writer.save(self.engine, meta)

    def _look_into(self, step: int, result: engine.StepResult) -> None:
        """Write down a step that was left out: its samples, and where in the net its worst micro-batches go wrong."""
        parts = []
        if self.guard.state.in_a_row <= _DIAGNOSED_IN_A_ROW:
            self.watchdog.tick(f"looking into step {step + 1}")
            with self.meter.paused():
                self.twin.load_state_dict(self.engine.full_state("model", everywhere=True))
                own = diagnose(
                    *(self.config, self.task, self.ranks, step, result.micro_losses.tolist()),
                    *(self.twin, self.place, self.device, self.engine.bf16),
                )
                parts = gather(own)
        if self.tracker:
            epoch, in_epoch = divmod(step, self.order.steps_per_epoch)
            samples, _ = self.order.rank_steps(epoch, in_epoch, in_epoch + 1, 0, 1)
            record = incident(
                *(step + 1, str(result.refused), result.loss, result.grad_norm, epoch, samples[0].tolist(), parts)
            )
            self.ledger.append(json.dumps(record))
            self.tracker.event(step + 1, incident_line(record))

    def _rewind(self, done: int, reason: str) -> None:
        """Back to the weights of the last checkpoint before the fault, and on with the batches that follow `done`.

        The data and the schedule do not go back: the same steps from the same weights would meet the same fault.
        """
        path, before = None, None
        if self.ranks.rank == 0:
            self.writer.wait()
            path, before = find_rewind(self.config.run_dir / CHECKPOINTS) or (None, None)
        path, before = from_rank_0((path, before))
        state = self.guard.state
        if self.config.guard.mode != "rewind" or state.rewinds >= self.config.guard.rewinds_max or path is None:
            ledger = self.config.run_dir / record.GUARD_FILE
            raise GuardError(explain_end(self.config.guard, state, done, reason, ledger, path))
        self.watchdog.tick("rewinding")
        with self.meter.paused():
            self.engine.load_weights(read_tensors(path / "model.safetensors"))
            self.engine.load_state(read_optimizer(path), before.updates)
        self.guard.rewound()
        if self.tracker:
            self.tracker.event(
                done,
                f"REWOUND to the weights of {path.name} after {state.in_a_row} steps left out in a row; "
                f"the batches of steps {before.step + 1} to {done} are passed over",
            )

    def _stopped(self, done: int) -> int:
        """The end of a run that was asked to stop: the same command goes on with it."""
        reasons = [reason for reason in gather(self.stop.reason) if reason]
        reason = reasons[0] if reasons else "stopped"
        self.stop.disarm()
        if not from_rank_0(self.writer.wait()):
            newest = from_rank_0(self.writer.last)
            raise CheckpointError(
                f"stopped ({reason}) at step {done}, whose checkpoint could not be written: free some space for "
                f"{self.config.run_dir}; the same command goes on from {newest.name if newest else 'the start'}"
            )
        if self.tracker:
            self.tracker.event(done, interrupted_line(done, self.steps, reason, self.writer.last))
            self.tracker.finish("KILLED", record.files(self.config.run_dir), reason, checkpoint=self.writer.last)
        barrier()  # the launcher ends the others as soon as one has left
        return EXIT_REQUEUE

    def _finished(self) -> int:
        self.stop.disarm()
        if not from_rank_0(self.writer.wait()):
            raise CheckpointError(
                f"the run has done its last step, and its last checkpoint could not be written: free some space for "
                f"{self.config.run_dir}, and the same command goes on from its newest checkpoint"
            )
        if self.tracker:
            record.end(
                *(self.tracker, self.command, self.config, self.task.data.dataset_id, self.validation.metrics),
                *(self.steps, self._seconds, self.writer.last),
            )
        return 0
