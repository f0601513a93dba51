"""`sync-tracking`: what a real MLflow server was not told during a run, it is told afterwards, and only once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from data_prep.manifest import Manifest
from pipeline.__main__ import main
from pipeline.config.load import Config, load
from pipeline.ranks.lifetime import exclusive
from pipeline.records.family import PARENT_TAG, Lineage
from pipeline.records.figures import SHEET
from pipeline.records.journal import JOURNAL_FILE, UNSENT, read_journal
from pipeline.records.run_id import ID_FILE
from pipeline.records.stage import Stage, log_stage
from pipeline.records.tracking import Tracker
from tests.pipeline.records.test_tracking import history, start_server
from tests.support.datasets import Datasets

STEPS = 700  # more than a request holds, with two metrics


def configured(root: Path, datasets: Datasets, name: str, uri: str) -> Config:
    overrides = [f"output_root={root}", f"name={name}", f"data.path={datasets.in22k}", f"tracking.uri={uri}"]
    config = load("configs/demo_pretrain.yaml", overrides)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    manifest_of(datasets).save(config.run_dir)
    return config


def manifest_of(datasets: Datasets) -> Manifest:
    return Manifest.load(datasets.in22k)


def begun(config: Config, datasets: Datasets, first_step: int = 0) -> Tracker:
    lineage = Lineage("pretrain", manifest_of(datasets), str(datasets.in22k), None, ("a", "a", "b"))
    return Tracker(config, {"stage": "pretrain"}, first_step, lineage)


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def ended(
    datasets: Datasets, port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, mlflow.MlflowClient]]:
    """Two runs that are over, and a third, while nobody listened; and then a server."""
    root, uri = tmp_path_factory.mktemp("runs"), f"http://127.0.0.1:{port}"
    retries = pytest.MonkeyPatch()
    retries.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    whole = configured(root, datasets, "whole-pretrain", uri)
    tracker = begun(whole, datasets)
    for step in range(1, STEPS + 1):
        tracker.log(step, {"loss": 1 / step, "lr": float(step)}, "")
    tracker.log_system(STEPS, {"a": {"cpu_percent": 50.0}})
    tracker.event(3, "LEFT OUT")
    (whole.run_dir / SHEET).touch()
    tracker.attach(whole.run_dir / SHEET)
    tracker.finish(
        "FINISHED", [whole.run_dir / "config.yaml"], results={"top1": 12.5}, checkpoint=root / "step-00000700"
    )
    assert log_stage(whole.run_dir, Stage("evaluate", "evaluate it", STEPS, {"top1_percent": 12.5})) is None
    failed = begun(configured(root, datasets, "failed", uri), datasets)
    failed.log(1, {"loss": 1.0}, "")
    failed.finish("FAILED", [], "ZeroDivisionError: no way")
    killed = begun(configured(root, datasets, "killed", uri), datasets)
    killed.log(1, {"loss": 1.0}, "")
    killed._sender.retry_seconds = 1e6  # a process that is gone does not try again
    killed.flush()
    retries.undo()
    server = start_server(root, port)
    yield root, mlflow.MlflowClient(uri)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def in_mlflow(client: mlflow.MlflowClient, name: str) -> mlflow.entities.Run:
    (run,) = [run for run in client.search_runs(["1"], max_results=100) if run.info.run_name == name]
    return run


def test_all_is_told_once(ended: tuple[Path, mlflow.MlflowClient], capsys: pytest.CaptureFixture[str]) -> None:
    root, client = ended
    uri = client.tracking_uri
    for tries in range(2):
        assert main(["sync-tracking", str(root)]) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line.partition(" numbers")[0] for line in said] == [
            f"{root / name}: {0 if tries else numbers:,}"
            for name, numbers in (("failed", 1), ("killed", 1), ("whole-pretrain", 2 * STEPS + 1))
        ]
        whole = in_mlflow(client, "whole-pretrain")
        for key in ("loss", "lr"):
            logged = [json.loads(line) for line in (root / "whole-pretrain" / "log.jsonl").read_text().splitlines()]
            wanted = [(line["step"], line[key], round(line["time"] * 1000)) for line in logged]
            assert history(uri, whole.info.run_id, key) == wanted
        assert whole.data.metrics["system/a/cpu_percent"] == 50.0
        journal = read_journal(root / "whole-pretrain")
        times = (journal["began"], journal["end"]["time"])
        assert (whole.info.start_time, whole.info.end_time) == times  # those of the run, not of its telling
        assert whole.info.status == "FINISHED"
        assert {key: whole.data.tags[key] for key in journal["tags"]} == journal["tags"]
        assert whole.data.tags["hosts"] == "a, b"
        assert whole.data.tags["checkpoint"] == str(root / "step-00000700")
        assert "restarts" not in whole.data.tags
        assert whole.inputs.dataset_inputs[0].dataset.name == "in22k"
        assert {file.path for file in client.list_artifacts(whole.info.run_id)} == {"config.yaml", "events.txt", SHEET}
        parent = client.get_run(whole.data.tags[PARENT_TAG])
        assert len(client.get_metric_history(parent.info.run_id, "pretrain_top1")) == 1
        assert in_mlflow(client, "evaluate it").data.metrics == {"top1_percent": 12.5}
        assert not (root / "whole-pretrain" / UNSENT).exists()
        failed = in_mlflow(client, "failed")
        assert (failed.info.status, failed.data.tags["stopped"]) == ("FAILED", "ZeroDivisionError: no way")
        killed = in_mlflow(client, "killed")
        assert (killed.info.status, killed.data.tags["stopped"]) == ("KILLED", "nobody wrote down its end")


def test_it_goes_on_afterwards(
    ended: tuple[Path, mlflow.MlflowClient], datasets: Datasets, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was told of is gone on with, in MLflow too, also where its folder was moved to."""
    root, client = ended
    assert main(["sync-tracking", str(root / "killed")]) == 0
    run_id = in_mlflow(client, "killed").info.run_id
    overrides = [f"output_root={root}", "name=killed", f"tracking.uri={client.tracking_uri}"]
    again = begun(load("configs/demo_pretrain.yaml", overrides), datasets, first_step=1)
    again.log(2, {"loss": 2.0}, "")
    again.flush()
    assert again.run_id == run_id
    assert "end" not in read_journal(root / "killed")
    with exclusive(root / "killed"):
        assert main(["sync-tracking", str(root / "killed")]) == 1
    assert "writes to it, and sends what waits itself" in capsys.readouterr().err
    again.finish("FINISHED", [])
    moved = root / "elsewhere" / "renamed"
    shutil.copytree(root / "killed", moved)
    assert main(["sync-tracking", str(moved)]) == 0
    assert "0 numbers sent; MLflow has all, FINISHED" in capsys.readouterr().out
    assert [(step, value) for step, value, _ in history(client.tracking_uri, run_id)] == [(1, 1.0), (2, 2.0)]
    assert in_mlflow(client, "killed").info.status == "FINISHED"


def test_what_cannot_be_told(
    ended: tuple[Path, mlflow.MlflowClient], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 1, and nothing lost; the other runs are told of all the same."""
    root, _ = ended
    assert main(["sync-tracking", str(tmp_path)]) == 1
    assert "is no run's folder and has none in it" in capsys.readouterr().err
    for name in ("damaged", "good", "nobody", "removed"):
        shutil.copytree(root / "failed", tmp_path / name)
    line = '{"time": 1.0, "step": 1, "loss": 1.0}\n'
    (tmp_path / "damaged" / "log.jsonl").write_text(f"{line}{{\n{line}")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        silent = f"http://127.0.0.1:{closed.getsockname()[1]}"
    database = tmp_path / "removed" / "mlflow.db"
    for name, uri in (("nobody", silent), ("removed", f"sqlite:///{database}")):
        for file in (ID_FILE, JOURNAL_FILE):
            known = json.loads((tmp_path / name / file).read_text())
            (tmp_path / name / file).write_text(json.dumps({**known, "uri": uri}))
    assert main(["sync-tracking", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "log.jsonl: line 2 of 3 is damaged" in said.err
    assert f"{tmp_path / 'nobody'}: MLflow has not got all of it" in said.err
    assert "training goes on" not in said.err
    assert f"MLflow's database {database}, which knows the run, is not there" in said.err
    assert not database.exists()
    assert f"{tmp_path / 'good'}: 0 numbers sent" in said.out
    assert (tmp_path / "damaged" / "log.jsonl").read_text() == f"{line}{{\n{line}"
