"""Weights by MLflow: an export is registered, and another run starts from it by its alias, version or run."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest
import torch

from pipeline.__main__ import main
from pipeline.checkpoints.choice import find_source
from pipeline.checkpoints.files import META_FILE, CheckpointError
from pipeline.checkpoints.transfer import load_into
from pipeline.config.load import Config, load
from pipeline.models.build import build_model
from pipeline.models.hornet import HorNet
from pipeline.records.family import Lineage
from pipeline.records.journal import UNSENT
from pipeline.records.run_id import ID_FILE
from pipeline.records.stage import Stage, log_stage, register
from pipeline.records.tracking import Tracker
from pipeline.training.initial import FOLDER, fetch, found_in_mlflow, local_init
from tests.support.checkpoints import write_checkpoint
from tests.support.datasets import SYNSETS_22K

STEP = "step-00000001"


def configured(root: Path, name: str, *more: str) -> Config:
    return load("configs/demo_pretrain.yaml", [f"output_root={root}", f"name={name}", "data.path=nowhere", *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HorNet, str]:
    """A run with a checkpoint of 60 % top-1, its net, and its run in MLflow."""
    root = tmp_path_factory.mktemp("runs")
    config = configured(root, "demo-pretrain", "data.resolution=64")
    net = write_checkpoint(config.run_dir, config, SYNSETS_22K)
    score(config.run_dir, 60.0)
    tracker = Tracker(config, {}, 0, Lineage("pretrain"))
    tracker.log(1, {"loss": 1.0}, "")
    tracker.finish("FINISHED", [], checkpoint=config.run_dir / "checkpoints" / STEP)
    return config.run_dir, net, str(tracker.run_id)


def score(run: Path, top1: float) -> None:
    path = run / "checkpoints" / STEP / META_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "metrics": {"top1": top1}}))


@pytest.fixture(scope="module")
def registered(trained: tuple[Path, HorNet, str]) -> mlflow.MlflowClient:
    """Two versions: the second is the newest, the first the best."""
    run = trained[0]
    assert main(["export", str(run), "--to", "timm", "--register", "hornet-demo"]) == 0
    score(run, 50.0)
    assert main(["export", str(run), "--to", "timm", "--register", "hornet-demo"]) == 0
    score(run, 60.0)
    uri = f"sqlite:///{run.parent / 'mlflow.db'}"
    return mlflow.MlflowClient(uri, uri)


def test_the_registry(trained: tuple[Path, HorNet, str], registered: mlflow.MlflowClient) -> None:
    found = registered.get_registered_model("hornet-demo")
    assert {alias: int(version) for alias, version in found.aliases.items()} == {"best": 1, "newest": 2}
    best = registered.get_model_version("hornet-demo", "1")
    assert (best.tags["score"], best.tags["model"]) == ("60", "hornet_nano_gf")
    assert best.description.startswith("# ")  # the card, without the header that the Hub reads
    assert 'timm.create_model("local-dir:FOLDER"' in best.description
    export, pretrain = registered.get_run(best.run_id), registered.get_run(trained[2])
    assert export.data.tags["mlflow.parentRunId"] == pretrain.data.tags["mlflow.parentRunId"]
    assert (export.info.status, export.data.tags["stage"]) == ("FINISHED", "export")


def test_a_name_is_of_one_kind(
    trained: tuple[Path, HorNet, str], registered: mlflow.MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    """`init.checkpoint=models:/NAME@best` counts on what timm loads."""
    assert main(["export", str(trained[0]), "--to", "safetensors", "--register", "hornet-demo"]) == 1
    said = "its versions are exports --to timm: register safetensors under another name"
    assert said in capsys.readouterr().err
    assert len(registered.search_model_versions("name = 'hornet-demo'")) == 2


def test_the_same_score_again_is_the_best(trained: tuple[Path, HorNet, str], registered: mlflow.MlflowClient) -> None:
    """Also one that is longer than it is written: 66.67 % of 21 images."""
    for score_again in (200 / 3, 200 / 3, 60.0):
        register(trained[0], trained[2], "again", {}, score_again)
    found = registered.get_registered_model("again").aliases
    assert {alias: int(version) for alias, version in found.items()} == {"best": 2, "newest": 3}


@pytest.mark.parametrize("address", ["models:/hornet-demo@best", "models:/hornet-demo/2", "runs:/RUN"])
def test_a_run_starts_from_it(
    trained: tuple[Path, HorNet, str], registered: mlflow.MlflowClient, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, net, run_id = trained
    address = address.replace("RUN", run_id)
    name = address.rpartition("/")[2].replace("@", "-")
    config = configured(run.parent, name, "data.resolution=64", f"init.checkpoint={address}")
    fetch(config)
    model = build_model(config.model, len(SYNSETS_22K), 64)
    fitted = load_into(model, find_source(local_init(config)), SYNSETS_22K)
    assert fitted.unmatched == []
    for key, value in net.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    # What the run began with stays, wherever the alias is by then, and MLflow.
    assert not [path for path in (config.run_dir / FOLDER).iterdir() if path.is_dir()]
    if address.endswith("@best"):
        assert found_in_mlflow(config) == "models:/hornet-demo/1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    fetch(config)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("models:/hornet-demo@nothing", "was not found in MLflow at sqlite:"),
        ("models:/nothing/1", "was not found in MLflow at sqlite:"),
        ("models:/hornet-demo", "give models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN_ID"),
        ("runs:/0123456789abcdef0123456789abcdef", "was not found in MLflow at sqlite:"),
    ],
)
def test_what_is_not_there(
    trained: tuple[Path, HorNet, str], registered: mlflow.MlflowClient, address: str, said: str
) -> None:
    config = configured(trained[0].parent, "nobody", f"init.checkpoint={address}")
    with pytest.raises(CheckpointError) as caught:
        fetch(config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (config.run_dir / FOLDER).exists()


def test_a_checkpoint_that_is_elsewhere(trained: tuple[Path, HorNet, str], registered: mlflow.MlflowClient) -> None:
    run, _, run_id = trained
    registered.set_tag(run_id, "checkpoint", "/nowhere/checkpoints/step-00000001")
    config = configured(run.parent, "nobody", f"init.checkpoint=runs:/{run_id}")
    with pytest.raises(CheckpointError, match=r"is not on this host; name an export of it, models:/NAME@best"):
        fetch(config)
    registered.delete_tag(run_id, "checkpoint")
    with pytest.raises(CheckpointError, match=r"it has no checkpoint; name an export of it, models:/NAME@best"):
        fetch(config)
    registered.set_tag(run_id, "checkpoint", str(run / "checkpoints" / STEP))


def test_a_database_that_is_gone_is_not_made_again(
    trained: tuple[Path, HorNet, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow's client would make an empty one in its place, which the next run would be in."""
    config = configured(tmp_path, "nobody", "init.checkpoint=models:/hornet-demo@best")
    with pytest.raises(CheckpointError, match=r"mlflow\.db is not there: set tracking\.uri"):
        fetch(config)
    (tmp_path / ID_FILE).write_text(json.dumps({"uri": f"sqlite:///{tmp_path}/mlflow.db", "run_id": "x"}))
    assert log_stage(tmp_path, Stage("evaluate", "evaluate x", 1)) is None
    assert "mlflow.db is not there any more" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [ID_FILE, UNSENT]


def test_a_password_that_an_error_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cr3t-word@127.0.0.1:9")
    (tmp_path / ID_FILE).write_text(json.dumps({"uri": "http://127.0.0.1:9", "run_id": "x"}))

    def refuse(*_: object) -> None:
        raise OSError("the login me, s3cr3t-word was refused")

    monkeypatch.setattr("pipeline.records.stage._log", refuse)
    assert log_stage(tmp_path, Stage("evaluate", "evaluate x", 1)) is None
    said = capsys.readouterr().err
    assert "me, *** was refused" in said
