"""A stage that is over when it is told of: an evaluation or an export, under the parent of the run that it is of."""

from __future__ import annotations

import math
import os
import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.credentials import without_credentials
from pipeline.ranks.log_file import say
from pipeline.records.address import missing_database
from pipeline.records.family import KEY_TAG, PARENT_TAG, end_parent, is_active, made_once
from pipeline.records.journal import drop_unsent, keep_unsent, read_journal
from pipeline.records.mlflow_run import package
from pipeline.records.provenance import provenance
from pipeline.records.run_id import read_id

_NO_KEY = re.compile(r"[^\w./ :-]")  # what MLflow takes in no name of a metric
_YAML_HEADER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_DESCRIPTION_CHARS = 5000  # MLflow's databases (3.17) hold no more
BEST, NEWEST = "best", "newest"  # aliases of a registered model; MLflow (3.17) keeps `latest` for itself


@dataclass(frozen=True)
class Stage:
    """What is told: under `name`, as a `stage`, at `step`; `files` and the content of `folder` become artifacts.

    `results` stand at the parent too, under the stage's name: by names that say on what they were measured.
    """

    stage: str
    name: str
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()
    folder: Path | None = None
    results: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Stage:
        """From what `asdict` made, by way of JSON."""
        paths = {"files": [Path(file) for file in kept["files"]], "folder": kept["folder"] and Path(kept["folder"])}
        return cls(**{**kept, **paths})


def is_known(run_dir: Path) -> bool:
    """Whether the run folder has a run in MLflow; not where MLflow was never reached."""
    return bool(_known(run_dir))


def log_stage(run_dir: Path, stage: Stage) -> str | None:
    """Add the stage to the experiment that the run folder belongs to; its MLflow run's id.

    One of the same run and name takes the place of the former, but where `folder` is sent. None, with a warning, where
    MLflow does not take it, and in silence where the run itself is not in MLflow; both are kept for `sync-tracking`.
    """
    name = f"{stage.stage}-{stage.name.removeprefix(stage.stage).strip()}"
    if not (known := _known(run_dir)):
        if read_journal(run_dir):
            keep_unsent(run_dir, name, asdict(stage))
        return None
    try:
        run_id = _log(known, stage)
    except Exception as error:  # mlflow's, SQLAlchemy's and requests'; what was measured or written is on disk
        keep_unsent(run_dir, name, asdict(stage))
        _warn(known, error)
        return None
    drop_unsent(run_dir, name)
    return run_id


def register(
    run_dir: Path, run_id: str, name: str, tags: Mapping[str, str], score: float | None, card: str = ""
) -> str:
    """Make the artifacts of an export a version of the registered model `name`, described by its Markdown `card`;
    returns its address.

    It becomes the `newest`, and the `best` where its score is at least that of the one before. Raises MLflow's errors.
    """
    known = _known(run_dir)
    mlflow, client = package(), _client(known)
    if not [model for model in client.search_registered_models(f"name = '{name}'") if model.name == name]:
        client.create_registered_model(name)
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    told = {key: without_credentials(value) for key, value in tags.items()}
    if score is not None:
        told["score"] = f"{score:.6g}"
    described = without_credentials(_YAML_HEADER.sub("", card).strip())[:_DESCRIPTION_CHARS]
    version = str(client.create_model_version(name, source, run_id, tags=told, description=described).version)
    client.set_registered_model_alias(name, NEWEST, version)
    try:
        best = float(client.get_model_version_by_alias(name, BEST).tags.get("score", "nan"))
    except (mlflow.MlflowException, ValueError):  # none yet, or somebody's own words
        best = math.nan
    if math.isnan(best) or (score is not None and float(told["score"]) >= best):  # both as they are written
        client.set_registered_model_alias(name, BEST, version)
    return f"models:/{name}/{version}"


def registered_kind(run_dir: Path, name: str) -> str | None:
    """The "kind" tag of the newest version of a registered model; None where there is none. Raises MLflow's errors."""
    found = _client(_known(run_dir)).search_model_versions(f"name = '{name}'")
    newest = max(found, key=lambda version: int(version.version), default=None)
    return None if newest is None else newest.tags.get("kind")


def _log(known: Mapping[str, Any], stage: Stage) -> str:
    entities, client = package().entities, _client(known)
    run = client.get_run(known["run_id"])
    experiment, parent = run.info.experiment_id, run.data.tags.get(PARENT_TAG, known["run_id"])
    if not is_active(client, parent):
        parent = known["run_id"]
    # Of this run: others of the same parent (seeds, a sweep) are measured at the same step, on the same set.
    key = f"{known['run_id']}-{stage.stage}-{stage.name}"
    if stage.folder is not None:  # versions of a model go on to stand on the former's
        key += f"-{uuid.uuid4().hex}"
    for former in client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'"):
        client.delete_run(former.info.run_id)
    tags = {PARENT_TAG: parent, "stage": stage.stage, **provenance([]), **stage.tags}
    run_id = str(made_once(client, experiment, key, stage.name, tags).info.run_id)
    stamp = client.get_run(run_id).info.start_time
    metrics = [entities.Metric(name, float(value), stamp, stage.step) for name, value in stage.metrics.items()]
    params = [entities.Param(name, without_credentials(value)[:500]) for name, value in stage.params.items()]
    client.log_batch(run_id, metrics=metrics, params=params)
    try:
        if stage.folder is not None:
            client.log_artifacts(run_id, str(stage.folder), "model")
    except Exception:
        client.set_terminated(run_id, "FAILED")  # or its parent would never end
        raise
    client.set_terminated(run_id, "FINISHED")
    for name, value in stage.results.items():
        client.log_metric(parent, _NO_KEY.sub("_", f"{stage.stage}_{name}"), float(value), step=stage.step)
    if parent != known["run_id"]:
        end_parent(client, experiment, parent)
    for path in filter(Path.exists, stage.files):  # last, as at the end of a run
        client.log_artifact(run_id, str(path))
    return run_id


def _known(run_dir: Path) -> dict[str, Any]:
    known = read_id(run_dir)
    return known if known.get("uri") and known.get("run_id") else {}


def _client(known: Mapping[str, Any]) -> Any:
    """Of the run's MLflow. Raises FileNotFoundError for a database that was removed, or moved with its runs."""
    uri = _uri(known)
    if (gone := missing_database(uri)) is not None:
        raise FileNotFoundError(f"{gone} is not there any more")
    return package().MlflowClient(uri, uri)  # its models too, whatever MLFLOW_REGISTRY_URI says


def _uri(known: Mapping[str, Any]) -> str:
    """With its password, which is written nowhere: it is MLFLOW_TRACKING_URI's where that is the same address."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return uri if uri and without_credentials(uri) == known["uri"] else str(known["uri"])


def _warn(known: Mapping[str, Any], error: Exception) -> None:
    reason = without_credentials(" ".join(str(error).split()), _uri(known))[:300] or type(error).__name__
    say(f"warning: MLflow at {known['uri']} did not take it ({reason})", sys.stderr)
