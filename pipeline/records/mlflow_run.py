"""One run in MLflow, by MLflow's client: the only file that imports mlflow, and only when it is first asked for."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.credentials import without_credentials
from data_prep.storage import atomic_write
from pipeline.config.run import RunConfig
from pipeline.records.address import check_address, database_file, make_database
from pipeline.records.family import (
    KEY_TAG,
    PARENT_TAG,
    Lineage,
    end_parent,
    is_active,
    log_data,
    log_data_prep,
    made_once,
    parent_of,
)
from pipeline.records.journal import read_journal, write_journal
from pipeline.records.provenance import provenance
from pipeline.records.review_address import review_base, run_address
from pipeline.records.run_id import ID_FILE, read_id

if TYPE_CHECKING:
    import mlflow

_BATCH = 500  # metrics a request may hold are limited by the server
_REASON_CHARS = 500
_NOT_THERE = "RESOURCE_DOES_NOT_EXIST"
_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")


class Metric(NamedTuple):
    """The fields of MLflow's, before mlflow is imported; timestamp in ms."""

    key: str
    value: float
    timestamp: int
    step: int


class MlflowRun:
    """The MLflow run of a run folder. Every method raises what MLflow, SQLAlchemy or requests do.

    `id` is None until it is created or found; `goes_on`: it was there before this process.
    """

    def __init__(
        self,
        config: RunConfig,
        tags: Mapping[str, str],
        first_step: int,
        lineage: Lineage | None = None,
        training: bool = True,
    ) -> None:
        """A run folder that had an MLflow run at this address goes on with it, where it goes on itself. training:
        false where MLflow is only told of one that is over.

        Raises ConfigError for an address that can never be reached.
        """
        self.config, self._tags, self._lineage = config, dict(tags), lineage
        self.uri = check_address(config)
        self.shown_uri = without_credentials(self.uri)
        self.id: str | None = None
        self.parent_id: str | None = None
        self._experiment_id = ""
        # Of a database file beside it: MLflow itself would take the folder that each process works in.
        file = database_file(self.uri)
        self._artifacts = (file.absolute().parent / "mlartifacts").as_uri() if file else None
        self._last_steps: dict[str, int] = {}  # of each metric, in MLflow, before this process
        self._key, self._former, self._training = uuid.uuid4().hex, "", training
        began = read_journal(config.run_dir).get("began") if first_step else None
        self._noted, self._noting = False, threading.Lock()
        self._began: int = began or round(time.time() * 1000)
        self._settings = hashlib.sha256(json.dumps(config.flat(), sort_keys=True).encode()).hexdigest()
        known = read_id(config.run_dir)
        if known.get("uri") == self.shown_uri:
            if first_step:
                self.id = known.get("run_id")
            else:  # a try that ended before its first checkpoint, or a run that began anew
                self._former = known.get("run_id") or ""
            if known.get("settings") == self._settings:
                self._key = known.get("key") or self._key
        self.goes_on = self._id_saved = self.id is not None

    def note(self) -> None:
        """Write down in the run folder, once, what MLflow is told of the run beside its numbers."""
        with self._noting:
            if not self._noted:
                self._noted = True
                self._note()

    def _note(self) -> None:
        lineage = self._lineage
        if lineage is not None and "versions" not in self._tags:
            self._tags |= provenance(lineage.hosts)
        entries: dict[str, Any] = {"uri": self.shown_uri, "tags": self._tags, "began": self._began}
        if lineage is not None:
            origin = None if lineage.origin is None else str(lineage.origin)
            entries |= {"stage": lineage.stage, "data": without_credentials(lineage.data), "origin": origin}
            entries["hosts"] = list(lineage.hosts)
        write_journal(self.config.run_dir, entries | ({"end": None} if self._training else {}))

    def open(self) -> None:
        """Create it, or go on with it."""
        make_database(self.uri, self._make_database)
        client = self._client()
        if not self.goes_on and self._former:
            self._take_up(client)
        if self.goes_on:
            self._go_on(client)
            return
        entities, lineage = package().entities, self._lineage
        self._experiment_id = self._experiment(client)
        if self.id is None:
            self._write_id()  # with the key alone: a process that is killed now finds again what it has made
            if lineage is not None:
                name, key = self.config.name, self._key
                if self.parent_id is None or not is_active(client, self.parent_id):
                    self.parent_id = parent_of(
                        client, self._experiment_id, lineage, name, key, self.shown_uri, self._began
                    )
                self._tags[PARENT_TAG] = self.parent_id
                client.update_run(self.parent_id, status="RUNNING")
            self.id = made_once(
                client, self._experiment_id, self._key, self.config.name, self._tags, self._began
            ).info.run_id
        params = [entities.Param(key, str(value)[:500]) for key, value in self.config.flat().items()]
        client.log_batch(self.id, params=params, tags=[entities.RunTag("run_dir", str(self.config.run_dir))])
        if lineage is not None and self.parent_id is not None:
            log_data(client, entities, self.id, lineage)
            log_data_prep(client, entities, self._experiment_id, self.parent_id, lineage, self.config.run_dir)

    def _go_on(self, client: mlflow.MlflowClient) -> None:
        assert self.id is not None
        known = client.get_run(self.id)
        self._experiment_id, tags = known.info.experiment_id, known.data.tags
        # Of each metric the newest value: its history may be tens of thousands of them.
        self._last_steps = {metric.key: metric.step for metric in known.to_proto().data.metrics}
        self.parent_id = tags.get(PARENT_TAG)
        if not self._training:
            return
        for run_id in filter(None, (self.id, self.parent_id)):
            with nullcontext() if run_id == self.id else suppress(Exception):  # somebody has deleted the parent
                client.update_run(run_id, status="RUNNING")
        if "stopped" in tags:
            client.delete_tag(self.id, "stopped")
        for key, value in {**self._tags, "restarts": int(tags.get("restarts", 0)) + 1}.items():
            if tags.get(key) != value:
                client.set_tag(self.id, key, value)

    def _take_up(self, client: mlflow.MlflowClient) -> None:
        """A try of the same run that ended before its first checkpoint is gone on with; of another run, it ends."""
        try:
            run = client.get_run(self._former)
        except package().MlflowException as error:
            if error.error_code != _NOT_THERE:
                raise
            run = None
        same = run is not None and run.data.tags.get(KEY_TAG) == self._key
        if run is None or run.info.lifecycle_stage != "active" or run.info.status == "FINISHED":
            self._key = uuid.uuid4().hex if same else self._key
        elif same:
            self.id, self.goes_on = self._former, True
        elif run.info.status == "RUNNING":
            client.set_tag(self._former, "stopped", "begun anew")
            client.set_terminated(self._former, "KILLED")
        self._former = ""

    @property
    def address(self) -> str | None:
        """Its page, on the server or on the one that `make review` starts; None as long as MLflow was not reached."""
        base = self.shown_uri if self.uri.startswith("http") else review_base()
        return run_address(base, self._experiment_id, self.id) if self.id and self._experiment_id else None

    def is_gone(self) -> bool:
        """Whether it was deleted in MLflow, or the database is another one now."""
        if self.id is None:
            return False
        try:
            return bool(self._client().get_run(self.id).info.lifecycle_stage != "active")
        except package().MlflowException as error:
            if error.error_code != _NOT_THERE:
                raise
            return True

    def forget(self) -> None:
        """The next `open` creates another one."""
        self.id, self.goes_on, self._id_saved, self._last_steps = None, False, False, {}
        self._key = uuid.uuid4().hex

    def new_to_it(self, metrics: Sequence[Metric]) -> list[Metric]:
        """Without those of steps that MLflow has from before this process: it would show them twice."""
        return [metric for metric in metrics if metric.step > self._last_steps.get(metric.key, -1)]

    def send(self, metrics: list[Metric]) -> None:
        """Log the first of `metrics`, as many as a request may hold, and take them out of the list."""
        assert self.id is not None
        metric_of, batch = package().entities.Metric, metrics[:_BATCH]
        self._client().log_batch(self.id, metrics=[metric_of(*metric) for metric in batch])
        del metrics[: len(batch)]

    def send_text(self, text: str, name: str) -> None:
        """Make `text` its artifact `name`."""
        assert self.id is not None
        self._client().log_text(self.id, text, name)

    def send_file(self, path: Path) -> None:
        """Make the file its artifact, under its name."""
        assert self.id is not None
        self._client().log_artifact(self.id, str(path))

    def end(
        self,
        status: str,
        reason: str | None,
        files: Sequence[Path] = (),
        results: Mapping[str, float] | None = None,
        checkpoint: Path | None = None,
        ended: int | None = None,
    ) -> None:
        """End it with `status`, the tag "stopped" for a `reason`, and those of `files` that exist as artifacts.

        `checkpoint`, which stays where it is, is named by a tag. Its parent ends with it, where it is the last, and
        shows its `results` under the stage's name. ended: Unix time in ms, now by default.
        """
        assert self.id is not None
        client = self._client()
        if reason is not None:
            client.set_tag(self.id, "stopped", without_credentials(" ".join(reason.split()))[:_REASON_CHARS])
        if checkpoint is not None:
            client.set_tag(self.id, "checkpoint", str(checkpoint))
        client.set_terminated(self.id, status, ended)
        if self._lineage is not None and self.parent_id is not None and is_active(client, self.parent_id):
            shown = client.get_run(self.parent_id).data.metrics
            for key, value in (results or {}).items():
                if shown.get(name := f"{self._lineage.stage}_{key}") != value:  # told again: once all the same
                    client.log_metric(self.parent_id, name, value)
            end_parent(client, self._experiment_id, self.parent_id)
        for path in files:  # last: artifacts may be kept by another server, which is down or refuses
            if path.exists():
                client.log_artifact(self.id, str(path))

    def save_id(self) -> None:
        """Write down which one it is, for the run that goes on."""
        if not self._id_saved and self.id is not None:
            self._id_saved = self._write_id()

    def _write_id(self) -> bool:
        known = {"uri": self.shown_uri, "run_id": self.id, "key": self._key, "settings": self._settings}
        known |= {"parent_id": self.parent_id, "experiment_id": self._experiment_id}
        with suppress(OSError):  # a full disk: tried again with the next line
            with atomic_write(self.config.run_dir / ID_FILE) as file:
                file.write(json.dumps(known).encode())
            return True
        return False

    def _client(self) -> mlflow.MlflowClient:
        return package().MlflowClient(self.uri)

    def _make_database(self, uri: str) -> None:
        if self._artifacts is None:  # on a server
            package().MlflowClient(uri)
            return
        package()
        store = importlib.import_module("mlflow.store.tracking.sqlalchemy_store").SqlAlchemyStore(uri, self._artifacts)
        store.engine.dispose()

    def _experiment(self, client: mlflow.MlflowClient) -> str:
        name = self.config.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(client.create_experiment(name, artifact_location=self._artifacts))
            except package().MlflowException:
                experiment = client.get_experiment_by_name(name)  # another run was the first meanwhile
                if experiment is None:
                    raise
        return str(experiment.experiment_id)


def package() -> Any:
    """mlflow, imported where it is first asked for."""
    # Read when mlflow is imported: its defaults wait for minutes on a server that is down.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it shows no runs: review_address.py
    mlflow = importlib.import_module("mlflow")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def is_permanent(error: Exception) -> bool:
    """Whether MLflow refuses what it was asked, rather than being away: asking again changes nothing."""
    return isinstance(error, ImportError) or getattr(error, "error_code", _PASSING[0]) not in _PASSING
