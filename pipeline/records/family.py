"""The runs of one experiment in MLflow belong together: a parent, and under it a run for each stage, from the data on.

A stage finds its parent by the file that the run which it starts from has left in its folder, so on any machine and
after any number of requeues. What is made here carries a key, by which it is found again where a process was killed
before it could write down what it had made: nothing stands twice.
"""

from __future__ import annotations

import json
import os
import urllib.parse
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.credentials import without_credentials
from data_prep.ledger import LEDGER_NAME, count_actions
from data_prep.manifest import MANIFEST_NAME, dataset_folder
from pipeline.records.run_id import read_id

PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its pages show children under their parent
KEY_TAG = "pipeline.key"
DATA_PREP = "data_prep"
_DIGEST_CHARS = 36  # MLflow 3.17 takes no more
_VALUE_CHARS = 500


class DataSet(Protocol):
    """What a run has to know of its data set: `Manifest` and `DenseManifest` are such."""

    @property
    def name(self) -> str: ...

    @property
    def dataset_id(self) -> str: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def splits(self) -> Mapping[str, Any]: ...

    def save(self, directory: Any) -> None: ...


@dataclass(frozen=True)
class Lineage:
    """What a stage comes from: its name (pretrain, finetune, ...), its data, and the run folder of its weights.

    hosts: of each rank.
    """

    stage: str
    manifest: DataSet | None = None
    data: str = ""
    origin: Path | None = None
    hosts: tuple[str, ...] = ()


def made_once(
    client: Any, experiment: str, key: str, name: str, tags: Mapping[str, str], start: int | None = None
) -> Any:
    """The run of the experiment that has this key, made now where there is none. start: Unix time in ms."""
    found = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    return found[0] if found else client.create_run(experiment, start, {**tags, KEY_TAG: key}, name)


def parent_of(
    client: Any, experiment: str, lineage: Lineage, name: str, key: str, shown_uri: str, start: int | None = None
) -> str:
    """The id of the parent: that of the run the weights come from, if it is in this experiment, else a new one, from
    `start` on (Unix time in ms).
    """
    tags = {}
    if lineage.origin is not None and (known := read_id(lineage.origin)).get("uri") == shown_uri:
        with suppress(Exception):  # deleted, or another database
            run = client.get_run(known["run_id"])
            parent = run.data.tags.get(PARENT_TAG)
            if parent and run.info.experiment_id == experiment and is_active(client, parent):
                return str(parent)
            tags["continues"] = parent or known["run_id"]
    whole = name.removesuffix(f"-{lineage.stage}")
    name = whole if whole not in ("", name) else f"{name} (all stages)"
    return str(made_once(client, experiment, f"{key}-parent", name, {**tags, "stage": "all"}, start).info.run_id)


def is_active(client: Any, run_id: str) -> bool:
    """Whether it is there, and not deleted."""
    with suppress(Exception):
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    return False


def log_data(client: Any, entities: Any, run_id: str, lineage: Lineage) -> None:
    """The data set as an input of the run, as MLflow's pages show them."""
    manifest = lineage.manifest
    if manifest is None:
        return
    scheme = urllib.parse.urlsplit(lineage.data).scheme
    profile = {f"{name}_samples": split.samples for name, split in manifest.splits.items()}
    dataset = entities.Dataset(
        name=manifest.name,
        digest=manifest.dataset_id[:_DIGEST_CHARS],
        source_type=scheme or "local",
        source=json.dumps({"uri": without_credentials(lineage.data)}),
        profile=json.dumps({**profile, "classes": manifest.num_classes, "dataset_id": manifest.dataset_id}),
    )
    context = [entities.InputTag("mlflow.data.context", "training")]
    client.log_inputs(run_id, [entities.DatasetInput(dataset, context)])


def log_data_prep(client: Any, entities: Any, experiment: str, parent: str, lineage: Lineage, run_dir: Path) -> None:
    """The stage that has built the data, once under each parent: its settings, and what became of every image."""
    manifest = lineage.manifest
    if manifest is None:
        return
    folder = Path(dataset_folder(lineage.data))
    built = folder / MANIFEST_NAME
    start = round(built.stat().st_mtime * 1000) if built.is_file() else None
    tags = {PARENT_TAG: parent, "stage": DATA_PREP, "dataset": manifest.name, "dataset_id": manifest.dataset_id}
    key = f"{parent}-{manifest.dataset_id[:_DIGEST_CHARS]}"
    run = made_once(client, experiment, key, f"data: {manifest.name}", tags, start)
    if run.info.status == "FINISHED":
        return
    numbers = {"classes": manifest.num_classes}
    for name, split in manifest.splits.items():
        numbers |= {f"{name}_samples": split.samples, f"{name}_shards": len(split.shards)}
        numbers[f"{name}_bytes"] = sum(shard.bytes for shard in split.shards)
    if (folder / LEDGER_NAME).is_file():
        numbers |= {f"images_{action}": count for action, count in count_actions(folder / LEDGER_NAME).items()}
    stamp = start or run.info.start_time
    client.log_batch(
        run.info.run_id,
        metrics=[entities.Metric(key, float(value), stamp, 0) for key, value in numbers.items()],
        params=[
            entities.Param(key, without_credentials(str(value))[:_VALUE_CHARS])
            for key, value in {"path": lineage.data, **manifest.settings}.items()
        ],
    )
    with suppress(Exception):  # no store of artifacts keeps numbers back; each run has this file among its own
        client.log_artifact(run.info.run_id, os.fspath(run_dir / MANIFEST_NAME))
    client.set_terminated(run.info.run_id, "FINISHED", stamp)


def end_parent(client: Any, experiment: str, parent: str) -> None:
    """Where none of its stages is running, the parent has ended: well if each has at last, else as the newest of those
    that have not, so that an evaluation of what a failed stage has left does not make it FINISHED.
    """
    newest = ["attributes.start_time DESC"]
    runs = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{parent}'", max_results=1000, order_by=newest)
    last: dict[tuple[str, str], str] = {}  # its status, by stage and name
    for run in runs:
        last.setdefault((run.data.tags.get("stage", ""), run.info.run_name), run.info.status)
    status = next((status for status in last.values() if status != "FINISHED"), "FINISHED")
    if "RUNNING" not in last.values() and client.get_run(parent).info.status != status:
        client.set_terminated(parent, status)
