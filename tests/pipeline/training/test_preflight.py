"""What the check says before a start without refusing it, and the ledger of skipped samples across a resume."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from pipeline.config.load import Config, load
from pipeline.data.device_augment import DeviceAugment
from pipeline.data.views import BadSample, BadSampleLedger
from pipeline.training import preflight
from tests.support.checkpoints import write_checkpoint
from tests.support.datasets import SYNSETS_22K, Datasets
from tests.support.read_only import run_beside
from tests.support.runs import ROOT, small_run
from tests.support.web import web_server


def configured(datasets: Datasets, *more: str) -> Config:
    return load("configs/demo_pretrain.yaml", [*small_run(datasets, Path("unused"))[2:], *more])


def test_notes(datasets: Datasets, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(datasets.in22k)
    lanes = configured(datasets, "data.shuffle_lanes=16", "data.path=s3://bucket/set", "data.cache_gb=1e-6")
    preflight._tell_of_lanes(lanes, manifest, 6)
    lines = capsys.readouterr().err.splitlines()
    assert "note: 6 nodes share 16 lanes" in lines[0]
    assert "what does not fit is read image by image" in lines[1]
    preflight._tell_of_lanes(configured(datasets, "data.shuffle_lanes=16"), manifest, 4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    preflight.preflight(configured(datasets), 2, 1, True)
    assert "note: the compiled JPEG decoder is missing" in capsys.readouterr().err


def test_a_source_that_has_not_finished(datasets: Datasets, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "stopped"
    write_checkpoint(run, configured(datasets), SYNSETS_22K)
    (run / "config.yaml").touch()
    config, told = configured(datasets, f"init.checkpoint={run}"), f"note: init.checkpoint {run} is a run that has not"
    preflight.preflight(config, 2, 1, True)
    assert f"{told} finished: its weights are those of step 1\n" in capsys.readouterr().err
    (run / "summary.json").touch()
    preflight.preflight(config, 2, 1, True)
    assert told not in capsys.readouterr().err


def test_the_check_needs_no_torch(datasets: Datasets, tmp_path: Path) -> None:
    """Seconds that a wrong key, a wrong path, or a check before every launch need not wait for."""
    program = "import sys\nfrom pipeline.__main__ import main\ncode = main(sys.argv[1:])\n"
    program += "print(code, sorted({'torch', 'timm', 'pyarrow', 'mlflow', 'deepspeed'} & sys.modules.keys()))\n"
    for more in ((), ("augment.where=device",), ("train.global_batch=512",), ("init.checkpoint=runs/none",)):
        done = subprocess.run(
            [sys.executable, "-c", program, *small_run(datasets, tmp_path, *more), "--check", "--ranks", "2"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == f"{int('=512' in str(more) or 'none' in str(more))} []\n", done.stderr


@pytest.mark.parametrize("policy", ["off", "rand-foo1-m9", "none"])
def test_policies_that_timm_cannot_read(datasets: Datasets, policy: str) -> None:
    """On the host too, and before a start."""
    config = configured(datasets, "augment.where=host", f"augment.rand_augment={policy}")
    with pytest.raises(ValueError, match=rf"augment\.rand_augment '{policy}': timm cannot read it .*null is none"):
        preflight.preflight(config, 2, 1, True)


def test_places_that_cannot_be_written(datasets: Datasets, tmp_path: Path) -> None:
    """By the check, and by a run that nobody checked."""
    read_only = tmp_path / "read-only"
    read_only.mkdir()
    (tmp_path / "file").touch()
    for root, words in (
        (read_only, f"cannot be written to ({read_only}: Read-only file system)"),
        (tmp_path / "file" / "runs", f"cannot be written to ({tmp_path}/file: Not a directory)"),
    ):
        for more in (["--check"], []):
            done = run_beside(read_only, "pipeline", *small_run(datasets, root), *more)
            assert done.returncode == 1
            assert done.stderr == f"error: {root}/demo-pretrain {words}: set another output_root\n"
    with web_server(datasets.in22k) as address:
        remote = (f"data.path={address}", f"data.cache_folder={read_only}/cache")
        done = run_beside(read_only, "pipeline", *small_run(datasets, tmp_path, *remote), "--check")
    words = f"cannot be written to ({read_only}: Read-only file system): set another data.cache_folder"
    assert done.stderr == f"error: {read_only}/cache {words}\n"


@pytest.mark.parametrize(
    "text", ["rand", "rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.4", "rand-n1-inc0-mstd101", "3-augment"]
)
def test_policies_that_are_waved_through_are_served(datasets: Datasets, text: str) -> None:
    """The pattern of the check against timm, which reads the policy when the run starts."""
    settings = configured(datasets, "augment.where=device", f"augment.rand_augment={text}").augment
    if preflight._PLAIN_RAND_AUGMENT.fullmatch(text):
        DeviceAugment(settings)
    else:
        with pytest.raises(ValueError, match=r"augment\.rand_augment"):
            DeviceAugment(settings)


def test_the_ledger_goes_on_where_the_run_does(tmp_path: Path) -> None:
    """Steps that are run again are not in it twice, whatever ranks wrote them; what is kept of the epoch is counted."""
    for rank in (0, 5):
        ledger = BadSampleLedger(tmp_path, rank)
        for step in range(8):
            ledger.begin(step // 4)
            ledger.add(step, (BadSample(step, step // 4, "no image", 1),))
        assert ledger.count == 4
    with open(tmp_path / "rank-00005.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "cut off by a ki')
    again = BadSampleLedger(tmp_path, 0, first_step=6, epoch=1)
    assert again.count == 4  # steps 4 and 5, of two ranks
    for path in tmp_path.iterdir():
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(6))
    assert BadSampleLedger(tmp_path, 3, first_step=6, epoch=1).count == 0
