"""Runs of one experiment: nothing is made twice, whenever a process is killed; a parent that is gone is replaced."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest

from data_prep.manifest import Manifest
from pipeline.config.load import Config, load
from pipeline.records import mlflow_run
from pipeline.records.family import PARENT_TAG, Lineage
from pipeline.records.mlflow_run import MlflowRun
from pipeline.records.run_id import ID_FILE
from pipeline.records.stage import Stage, log_stage
from pipeline.records.tracking import Tracker
from tests.support.datasets import Datasets


def configured(root: Path, datasets: Datasets, name: str, *more: str) -> Config:
    config = load(
        "configs/demo_pretrain.yaml", [f"output_root={root}", f"name={name}", f"data.path={datasets.in22k}", *more]
    )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    Manifest.load(datasets.in22k).save(config.run_dir)
    return config


def lineage(datasets: Datasets, stage: str = "pretrain", origin: Path | None = None) -> Lineage:
    return Lineage(stage, Manifest.load(datasets.in22k), str(datasets.in22k), origin, ("node1", "node2"))


def opened(config: Config, of: Lineage, first_step: int = 0) -> MlflowRun:
    run = MlflowRun(config, {"stage": of.stage}, first_step, of)
    run.open()
    run.save_id()
    return run


def test_killed_before_the_id_was_written(root: Path, datasets: Datasets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was made until then is found again by the next try, on any machine."""
    config, client = configured(root, datasets, "a-pretrain"), mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    for made in ("parent", "run"):
        run = MlflowRun(config, {}, 0, lineage(datasets))
        with monkeypatch.context() as patch:
            if made == "parent":  # and killed before the run itself was
                patch.setattr(mlflow_run, "made_once", lambda *_: 1 / 0)
            else:
                patch.setattr(mlflow_run, "log_data", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run.open()
    run = opened(config, lineage(datasets))
    found = client.search_runs(["1"])
    assert sorted(each.info.run_name for each in found) == ["a", "a-pretrain", "data: in22k"]
    by_name = {each.info.run_name: each for each in found}
    assert by_name["a-pretrain"].info.run_id == run.id
    assert by_name["a-pretrain"].data.tags[PARENT_TAG] == by_name["a"].info.run_id == run.parent_id
    # A try that ended before its first checkpoint is gone on with; with other settings it is another run.
    run.end("KILLED", "SIGTERM")
    again = opened(config, lineage(datasets))
    assert (again.id, client.get_run(str(again.id)).data.tags["restarts"]) == (run.id, "1")
    other = opened(configured(root, datasets, "a-pretrain", "optimizer.lr_peak=1e-4"), lineage(datasets))
    assert other.id != run.id
    assert client.get_run(str(run.id)).info.status == "KILLED"
    assert client.get_run(str(run.id)).data.tags["stopped"] == "begun anew"


def test_a_stage_finds_its_parent(root: Path, datasets: Datasets) -> None:
    """Under the parent of the run that its weights come from; both data sets alike stand there once."""
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    first = configured(root, datasets, "b-pretrain")
    pretrain = opened(first, lineage(datasets))
    tune = [
        opened(configured(root, datasets, f"b-finetune-{seed}"), lineage(datasets, "finetune", first.run_dir))
        for seed in (1, 2)
    ]
    assert {run.parent_id for run in (pretrain, *tune)} == {pretrain.parent_id}
    assert len(client.search_runs(["1"])) == 5  # parent, data, and three stages
    pretrain.end("FINISHED", None, results={"top1": 1.0})
    tune[0].end("FAILED", "no")
    assert client.get_run(str(pretrain.parent_id)).info.status == "RUNNING"  # the other one is
    tune[1].end("FINISHED", None, results={"top1": 2.0})
    parent = client.get_run(str(pretrain.parent_id))
    assert parent.info.status == "FAILED"  # one of them has, and no evaluation of another makes up for it
    assert parent.data.metrics == {"pretrain_top1": 1.0, "finetune_top1": 2.0}
    assert log_stage(first.run_dir, Stage("evaluate", "e", 1, {"top1": 1.0})) is not None
    assert client.get_run(str(pretrain.parent_id)).info.status == "FAILED"
    # Runs of one parent are measured under the same name each: none takes the place of another's, one of its own does.
    for seed in (1, 2, 2):
        assert log_stage(root / f"b-finetune-{seed}", Stage("evaluate", "step-9", 9, {"top1": float(seed)}))
    measured = [run.data.metrics["top1"] for run in client.search_runs(["1"]) if run.info.run_name == "step-9"]
    assert sorted(measured) == [1.0, 2.0]
    settings = configured(root, datasets, "b-finetune-1", "optimizer.lr_peak=1e-4")
    opened(settings, lineage(datasets, "finetune", first.run_dir)).end("FINISHED", None)
    assert client.get_run(str(pretrain.parent_id)).info.status == "FINISHED"
    # Another experiment has a parent of its own, which says what it goes on from.
    away = opened(
        configured(root, datasets, "b-away", "tracking.experiment=other"), lineage(datasets, "finetune", first.run_dir)
    )
    assert away.parent_id != pretrain.parent_id
    assert client.get_run(str(away.parent_id)).data.tags["continues"] == pretrain.parent_id


def test_a_parent_that_was_deleted(root: Path, datasets: Datasets) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    config = configured(root, datasets, "c-pretrain")
    run = opened(config, lineage(datasets))
    client.delete_run(str(run.parent_id))
    on = opened(config, lineage(datasets), first_step=5)
    assert on.id == run.id
    on.end("FINISHED", None, results={"top1": 1.0})
    assert client.get_run(str(run.id)).info.status == "FINISHED"
    tune = opened(configured(root, datasets, "c-finetune"), lineage(datasets, "finetune", config.run_dir))
    assert tune.parent_id != run.parent_id
    (config.run_dir / ID_FILE).write_text("[]")
    assert json.loads((root / "c-finetune" / ID_FILE).read_text())["parent_id"] == tune.parent_id
    broken = opened(configured(root, datasets, "c-other"), lineage(datasets, "finetune", config.run_dir))
    assert broken.parent_id not in (tune.parent_id, run.parent_id)


def test_artifacts_that_have_no_place(root: Path, datasets: Datasets) -> None:
    """Numbers, results and the ends of the run, of its data and of its parent are in MLflow all the same."""
    (root / "mlartifacts").write_text("")
    config, client = configured(root, datasets, "d-pretrain"), mlflow.MlflowClient(f"sqlite:///{root}/mlflow.db")
    with Tracker(config, {"stage": "pretrain"}, 0, lineage(datasets)) as tracker:
        tracker.log(1, {"loss": 2.0}, "")
        tracker.attach(config.run_dir / "dataset.json")
        tracker.event(1, "something")
        tracker.finish("FINISHED", [config.run_dir / "log.jsonl"], results={"top1": 50.0})
    files, results = [config.run_dir / "log.jsonl"], {"in 1k, v2_top1": 40.0}  # a name that MLflow takes in part
    assert log_stage(config.run_dir, Stage("evaluate", "e", 1, {"top1": 40.0}, files=files, results=results)) is None
    assert log_stage(config.run_dir, Stage("export", "x", 1, folder=config.run_dir)) is None
    found = {run.info.run_name: run for run in client.search_runs(["1"])}
    assert found.pop("x").info.status == "FAILED"
    assert {name: run.info.status for name, run in found.items()} == dict.fromkeys(
        ("d", "d-pretrain", "data: in22k", "e"), "FINISHED"
    )
    assert found["d-pretrain"].data.metrics == {"loss": 2.0}
    assert found["d"].data.metrics == {"pretrain_top1": 50.0, "evaluate_in 1k_ v2_top1": 40.0}
