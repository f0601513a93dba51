"""`export`: what it writes loads elsewhere and gives the net's own logits, or nothing stands under its name."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from data_prep.manifest import Manifest, file_sha256
from pipeline.__main__ import main
from pipeline.config.load import load
from pipeline.export import write
from pipeline.export.check import Check, ExportError
from pipeline.export.graph import write_onnx
from pipeline.models.hornet import HorNet
from tests.support.checkpoints import DATASET, write_checkpoint
from tests.support.datasets import SYNSETS_22K, drawing
from tests.support.models import drawn_state, model_of
from tests.support.runs import ROOT

# What "torch, timm and this package's model code alone" are, and what is kept away from it.
LOAD = """
import sys
for name in ("data_prep", "deepspeed", "mlflow", "pydantic", "webdataset", "rich"):
    sys.modules[name] = None
import timm, torch
import pipeline.models
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
torch.manual_seed(0)
print(model.pretrained_cfg["label_names"][0], *model(torch.randn(1, 3, 64, 64))[0].tolist())
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HorNet]:
    run = tmp_path_factory.mktemp("runs") / "demo-pretrain"
    config = load(ROOT / "configs" / "demo_pretrain.yaml", ["data.path=nowhere", "data.resolution=64"])
    model = write_checkpoint(run, config, SYNSETS_22K)
    Manifest(name="demo-22k", dataset_id=DATASET, synsets=list(SYNSETS_22K), splits={}).save(run)
    return run, model


def logits_of(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(images)
    return logits


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("fp16", 1e-3)])
def test_timm_loads_it_in_a_fresh_environment(trained: Any, tmp_path: Path, precision: str, bound: float) -> None:
    run, model = trained
    assert main(["export", str(run), "--to", "timm", "--precision", precision]) == 0
    folder = run / "exports" / ("step-00000001-ema-timm" + ("-fp16" if precision == "fp16" else ""))
    for room in ("models", "ops"):
        shutil.copytree(ROOT / "pipeline" / room, tmp_path / "pipeline" / room)
    shutil.copy(ROOT / "pipeline" / "__init__.py", tmp_path / "pipeline")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    label, *numbers = done.stdout.split()
    assert label == SYNSETS_22K[0]
    torch.manual_seed(0)
    expected = logits_of(model, torch.randn(1, 3, 64, 64))[0]
    torch.testing.assert_close(torch.tensor([float(each) for each in numbers]), expected, atol=bound, rtol=bound)
    facts = json.loads((folder / "export.json").read_text())
    for name, file in facts["files"].items():
        assert file["sha256"] == file_sha256(folder / name)
        assert stat.S_IMODE((folder / name).stat().st_mode) == stat.S_IMODE((folder / "export.json").stat().st_mode)
    card = (folder / "README.md").read_text()
    assert f"trained on `demo-22k`: 4 classes, images: ; `dataset_id` {DATASET}" in card
    assert "Not evaluated" in card
    assert (folder / "classes.csv").read_text().splitlines()[2] == '1,n02121620,"cat, true cat"'


def test_onnx(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = trained
    for seed, wnid in enumerate(SYNSETS_22K * 3):
        (tmp_path / wnid).mkdir(exist_ok=True)
        (tmp_path / wnid / f"{seed}.jpg").write_bytes(drawing(wnid, seed))
    assert main(["export", str(run), "--to", "onnx", "--data", str(tmp_path)]) == 0
    folder = run / "exports" / "step-00000001-ema-onnx"
    said = capsys.readouterr().out
    assert "of 12 images 12 have the same top-1" in said
    assert said.rstrip().endswith(str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "classes.csv", "export.json", "model.onnx"]
    told = {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
    assert told["size"] == "64 x 64"
    assert json.loads(told["preprocessing"])["mean"] == [0.485, 0.456, 0.406]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    assert (image.name, image.shape) == ("image", ["batch", 3, 64, 64])
    for batch in (1, 17):
        images = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))
        (found,) = session.run(["logits"], {"image": images.numpy()})
        expected = logits_of(model, images).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
        assert (found.argmax(1) == expected.argmax(1)).all()


def test_a_program_of_torch_export(trained: Any) -> None:
    run, model = trained
    assert main(["export", str(run), "--to", "exported-program", "--weights", "raw", "--resolution", "96"]) == 0
    loaded = torch.export.load(run / "exports" / "step-00000001-raw-exported-program" / "model.pt2").module()
    images = torch.randn(5, 3, 96, 96)
    assert loaded(images).shape == (5, 4)
    assert (loaded(images) - logits_of(model, images)).abs().max() > 1e-3  # not the EMA's


def test_any_size_in_fp16(tmp_path: Path) -> None:
    """A model without global filters: height and width are free, and fp16 is near."""
    model = model_of(gf=False)
    model.load_state_dict(drawn_state(model))
    file = tmp_path / "model.onnx"
    assert write_onnx(model.eval(), Check("fp16", 64, any_size=True), file, {}).difference < 1e-3
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 32, 160)
    (found,) = session.run(None, {"image": images.numpy()})
    expected = logits_of(model, images)
    assert float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max().clamp(min=1)) < 1e-3


def test_what_does_not_come_out_as_it_went_in_is_not_written(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = trained
    images = {"fp32": 1e-3, "fp16": float("nan")}
    for precision, off in images.items():
        with pytest.raises(ExportError, match=r"gives other logits than the net"):
            Check(precision, 64).compare(model, lambda x, off=off: logits_of(model, x) + off, "it")

    def cut_short(*options: Any) -> float:
        options[-1].write_bytes(b"half of it")
        raise ExportError("model.pt2 gives other logits than the net")

    monkeypatch.setattr(write, "write_program", cut_short)
    before = sorted((run / "exports").glob("*")) if (run / "exports").exists() else []
    assert main(["export", str(run), "--to", "exported-program", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "error: model.pt2 gives other logits than the net\n"
    assert list(tmp_path.iterdir()) == []
    assert (sorted((run / "exports").glob("*")) if (run / "exports").exists() else []) == before


def test_mistakes_are_one_line(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for name in ("hub", "card"):
        assert main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / name)]) == 0
    (tmp_path / "hub" / ".git").mkdir()  # a clone of the Hub's, which it was written into
    (tmp_path / "card" / "README.md").write_text("mine")
    capsys.readouterr()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    (run / "mlflow_run.json").write_text(json.dumps({"uri": "http://127.0.0.1:9", "run_id": None}))  # never reached
    told = {
        ("onnx", "--dynamic-size"): "--dynamic-size: the global filters of this model are of one image size",
        ("timm", "--dynamic-size"): "--dynamic-size is for graphs; timm has none",
        ("timm", "--out", f"{tmp_path}/other"): "holds something else than an export",
        ("timm", "--out", f"{tmp_path}/other/thesis.txt"): "(it is a file)",
        ("timm", "--out", f"{tmp_path}/hub"): "holds something else than an export (.git)",
        ("timm", "--out", f"{tmp_path}/card"): "holds something else than an export (README.md was edited)",
        ("timm", "--out", "."): "is the folder that you are in",
        ("timm", "--out", f"{tmp_path}/other/thesis.txt/x"): "cannot be written",
        ("timm", "--resolution", "50"): "it is a multiple of 32",
        ("timm", "--register", "model"): "has no run in MLflow",
        ("timm", "--push-to-hub", "a/b/c"): "--push-to-hub a/b/c: ",
        ("timm", "--push-to-hub", "a/b"): "needs a login",
    }
    for options, text in told.items():
        assert main(["export", str(run), "--to", *options]) == 1, options
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith("error: ")
        assert text in said
    assert (tmp_path / "other" / "thesis.txt").read_text() == (tmp_path / "card" / "README.md").read_text() == "mine"
    assert (tmp_path / "hub" / ".git").is_dir()
    # A link is followed: what it leads to is replaced, not the link.
    (tmp_path / "card" / "README.md").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "card")
    assert main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "card" / "README.md").exists()
    assert not list(tmp_path.glob(".*"))


def test_push(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to the network: what would be asked of the Hub."""
    run, _ = trained
    asked: list[Any] = []

    class Api:
        def __init__(self, **options: str) -> None: ...

        def create_repo(self, name: str, exist_ok: bool) -> Any:
            from huggingface_hub import RepoUrl

            return RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, **options: Any) -> None:
            asked.append((options["repo_id"], sorted(path.name for path in Path(options["folder_path"]).iterdir())))

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_test")
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    out = tmp_path / "out"
    assert main(["export", str(run), "--to", "safetensors", "--out", str(out), "--push-to-hub", "me/hornet"]) == 0
    assert asked == [("me/hornet", ["README.md", "classes.csv", "export.json", "model.safetensors"])]
    assert capsys.readouterr().out.rstrip().endswith("https://huggingface.co/me/hornet")
