"""Data sets, checkpoints and run folders that the code before its packages were sorted has written: they are read, a
run that it began goes on, and the same sources give the same bytes. README.md says what is stored and how it was made.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file

from data_prep.__main__ import main as data_prep
from data_prep.build.shards import ShardSettings, dataset_id
from data_prep.manifest import Manifest, index_path
from data_prep.shards.tar import ShardTar, ShardTarReader
from pipeline.__main__ import main as pipeline
from tests.former.former_commands import evaluated, indexing, libraries, log_lines, odd_build, shards_build
from tests.support.former import unpack_former

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FINETUNE = "finetune.yaml"
EXPECTED = json.loads((HERE / "expected.json").read_text())
SAME_LIBRARIES = libraries() == EXPECTED["libraries"]
HAS_FFCV = importlib.util.find_spec("ffcv") is not None
BEST, STOPPED = (int((HERE / f"runs/pretrain/checkpoints/{link}").readlink().name[5:]) for link in ("best", "latest"))
STEPS = 24  # of a run that has ended
# Relative: another processor sums in another order, and Adam divides noise by noise.
LOSS, NORM = 1e-3, 1e-2
ONE_IMAGE = 6.3  # percent of the 16 for validation

# Commands of the pipeline, one after the other in one process: importing torch takes longer than any of them. The group
# of its one rank serves both trainings, as torch does not find a second one. One core, as tensors are tiny: two threads
# that wait for each other take many times as long where cores are busy.
PROGRAM = """
import json, os, sys
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
import torch.distributed
from data_prep.__main__ import main as data_prep
from pipeline.__main__ import main as pipeline
torch.distributed.destroy_process_group = lambda: None
for arguments in json.loads(sys.argv[1]):
    main = data_prep if arguments[0] == "index" else pipeline
    print("== exit code", main(arguments), flush=True)
"""

_RESUME = ["pretrain", "runs/pretrain/config.yaml", "tracking.uri=null"]  # MLflow's former database was not kept
COMMANDS = {
    "stopped": ["evaluate", "runs/pretrain"],
    "ended": ["evaluate", "ended/pretrain"],
    "check": [*_RESUME, "--check", "--ranks", "2"],
    "upgrade": ["index", "data/in22k", "--upgrade"],
    "resume": _RESUME,
    "finetune": ["finetune", FINETUNE, "init.checkpoint=ended/pretrain", "tracking.uri=null"],
}


def former(folder: Path) -> Path:
    """A copy of what is stored, to be worked on."""
    shutil.copy(HERE / FINETUNE, folder)
    return unpack_former(folder)


class Reading(NamedTuple):
    """COMMANDS under way, in a folder."""

    folder: Path
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module", autouse=True)
def reading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reading]:
    """Begun before the tests of data sets, which take as long."""
    folder = former(tmp_path_factory.mktemp("former"))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE / 'tiny'}", "COLUMNS": "200"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(list(COMMANDS.values()))]
    with open(folder / "said.txt", "wb") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
    yield Reading(folder, process)
    process.kill()
    process.wait()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return former(tmp_path)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.*"))}


@pytest.mark.parametrize("name", ["in22k", "in1k"])
def test_data_sets_are_whole(work: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Every sample decoded, every file against the manifest: shards, indexes, ledger, .beton; and others' tars."""
    code = data_prep(["verify", f"data/{name}", "--workers", "1"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert f"data/{name} is whole: 2 splits" in said


def test_the_same_archive_gives_the_same_bytes(work: Path) -> None:
    """But for what came with format 2, which `index --upgrade` adds; it keeps the set's id, for the runs on it. Nothing
    is encoded again, so only the ledger's Parquet and the decoders' words are the libraries'.
    """
    assert data_prep(["index", "data/in22k", "--upgrade"]) == 0
    (work / "data" / "in22k").rename(work / "before")
    format_ = "both" if HAS_FFCV else "webdataset"
    assert data_prep([format_ if word == "both" else word for word in shards_build()]) == 0
    manifest = json.loads((work / "before" / "dataset.json").read_text())
    there = json.loads((HERE / "data" / "in22k" / "dataset.json").read_text())
    assert manifest["dataset_id"] == there["dataset_id"]
    anew = json.loads((work / "data" / "in22k" / "dataset.json").read_text())
    manifest["dataset_id"] = anew["dataset_id"]
    for source in ("source", "val_source"):
        manifest["settings"][source]["fingerprint"] = anew["settings"][source]["fingerprint"]
    (work / "before" / "dataset.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    before, now = digests(work / "before"), digests(work / "data" / "in22k")
    if not SAME_LIBRARIES:
        tables = [pq.read_table(work / folder / "ledger.parquet") for folder in ("before", "data/in22k")]
        assert tables[0].drop_columns("detail").equals(tables[1].drop_columns("detail"))
        del before["ledger.parquet"], now["ledger.parquet"]
    if not HAS_FFCV:
        for split in manifest["splits"].values():
            split["betons"] = []
        assert json.loads((work / "data" / "in22k" / "dataset.json").read_text()) == manifest
        del now["dataset.json"]
        before = {file: digest for file, digest in before.items() if file != "dataset.json" and "beton" not in file}
    assert now == before


@pytest.mark.skipif(not SAME_LIBRARIES, reason="images that are encoded again are as the libraries make them")
def test_images_of_every_form_give_the_same_bytes(work: Path) -> None:
    """But for what came with format 2, which is taken away."""
    assert data_prep(odd_build()) == 0
    odd = work / "data" / "odd"
    as_format_1(odd)
    assert digests(odd) == EXPECTED["odd_build"]


def as_format_1(folder: Path) -> None:
    """The data set as format 1 had it: without `.cls` members and `_info.json`."""
    now, entries = Manifest.load(folder), {}
    for entry in (entry for split in now.splits.values() for entry in split.shards):
        with open(folder / entry.file, "rb") as file:
            samples = list(ShardTarReader(file, entry.file))
        with open(folder / entry.file, "wb") as file:
            tar = ShardTar(file, with_classes=False)
            for sample in samples:
                assert sample.label is not None
                tar.add(sample.key, sample.jpeg, sample.label, sample.described)
            tar.finish()
        tar.index().save(folder / index_path(entry.file))
        entries[entry.file] = tar.entry(entry.file)
    splits = {
        name: split.model_copy(update={"shards": [entries[entry.file] for entry in split.shards]})
        for name, split in now.splits.items()
    }
    settings = ShardSettings(**{field.name: now.settings[field.name] for field in fields(ShardSettings)})
    update = {"format_version": 1, "splits": splits, "dataset_id": dataset_id(now.synsets, splits, settings)}
    now.model_copy(update=update).save(folder)
    (folder / "_info.json").unlink()


def test_indexes_of_others_tars_are_made_as_before(work: Path) -> None:
    folder = work / "data" / "in1k"
    before = digests(folder)
    for file in (*folder.glob("*.npz"), folder / "dataset.json"):
        file.unlink()
    assert data_prep(indexing()) == 0
    assert digests(folder) == before


def test_indexes_of_others_tars_need_not_be_made_again(work: Path) -> None:
    """An interrupted `index` goes on: with the indexes there, no tar is read, so it may as well hold nothing."""
    folder = work / "data" / "in1k"
    before = digests(folder)
    (folder / "dataset.json").unlink()
    for tar in folder.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
        os.utime(tar, (0, 0))
    assert data_prep(indexing()) == 0
    for file in (*(path.name for path in folder.glob("*.npz")), "dataset.json"):
        assert digests(folder)[file] == before[file], file


def test_checkpoints_are_whole(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert pipeline(["checkpoint", "runs/pretrain", "--hashes"]) == 0
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    # step, epoch, images, written, top-1, size, kept because, state
    assert [(row[0], row[1], row[2], *row[6:]) for row in rows] == [
        (f"{BEST}", f"{BEST / 3:.2f}", f"{16 * BEST}", "best", "good"),
        (f"{STOPPED}", f"{STOPPED / 3:.2f}", f"{16 * STOPPED}", "last, rewind", "good"),
    ], said
    assert "hornet_former_gf, 4 classes" in said
    assert f"latest -> step-{STOPPED:08d}; best -> step-{BEST:08d}" in said
    for link in ("latest", "best"):
        assert pipeline(["checkpoint", f"runs/pretrain/checkpoints/{link}", "--tensors"]) == 0


@pytest.fixture(scope="module")
def read(reading: Reading) -> tuple[Path, dict[str, str]]:
    """The folder in which the pipeline has read the runs and gone on with one, and what it said of each command."""
    code = reading.process.wait(timeout=400)
    said = (reading.folder / "said.txt").read_text()
    parts = re.split(r"^== exit code (.*)\n", said, flags=re.MULTILINE)
    assert (code, parts[1::2]) == (0, ["0"] * len(COMMANDS)), said
    return reading.folder, dict(zip(COMMANDS, parts[::2], strict=False))


@pytest.mark.parametrize("which", ["stopped", "ended"])
def test_a_checkpoint_is_as_good_as_it_was(read: tuple[Path, dict[str, str]], which: str) -> None:
    now, before = evaluated(read[1][which]), EXPECTED["evaluated"][which]
    assert now["images"] == before["images"]
    assert now["top1"] == pytest.approx(before["top1"], abs=ONE_IMAGE)
    assert now["loss"] == pytest.approx(before["loss"], rel=LOSS)


def test_a_stopped_run_goes_on(read: tuple[Path, dict[str, str]]) -> None:
    """To where the code that began it came: every step's numbers, all state; its records go on, too. The data set has
    been upgraded in between.
    """
    assert "4 of 4 shards upgraded" in read[1]["upgrade"]
    folder, said = read
    run, before = folder / "runs" / "pretrain", HERE / "runs" / "pretrain"
    assert f"resumed from runs/pretrain/checkpoints/step-{STOPPED:08d}" in said["resume"]
    assert (run / "log.jsonl").read_text().startswith((before / "log.jsonl").read_text())
    events = (run / "events.txt").read_text()
    assert events.startswith((before / "events.txt").read_text())
    assert events.splitlines()[-1].endswith(f"step {STOPPED}  RESUMED from step-{STOPPED:08d} on 1 ranks")
    lines, ended = log_lines(run / "log.jsonl"), log_lines(HERE / "ended" / "pretrain" / "log.jsonl")
    compare_lines(lines, ended)
    assert lines[-1]["step"] == STEPS
    ours, theirs = tensors(run), tensors(HERE / "ended" / "pretrain")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype), name
        assert np.linalg.norm(ours[name] - value) <= NORM * np.linalg.norm(value) + 1e-6, name


def test_what_a_run_leaves_has_the_same_form(read: tuple[Path, dict[str, str]]) -> None:
    run, before = read[0] / "runs" / "pretrain", HERE / "ended" / "pretrain"
    # Of the set as it was upgraded; that of before differs as sets of the two formats do.
    assert (run / "dataset.json").read_bytes() == (read[0] / "data" / "in22k" / "dataset.json").read_bytes()
    config = yaml.safe_load((before / "config.yaml").read_text())
    config["tracking"]["uri"] = None
    config["model"]["cuda_graphs"] = False
    streams = {"val": None, "classes": None, "samples_per_epoch": None, "shuffle_samples": 1000, "cache": False}
    config["data"] |= {"reader": "indexed"} | {f"stream_{key}": value for key, value in streams.items()}
    assert yaml.safe_load((run / "config.yaml").read_text()) == config
    for file in (f"checkpoints/step-{STEPS:08d}/checkpoint.json", "summary.json", "mlflow_run.json"):
        now, then = (json.loads((folder / file).read_text()) for folder in (run, before))
        assert now.pop("config", config) == config
        then.pop("config", None)
        now.get("metrics", now).pop("tied_top1", None)  # which was not told
        if file == "mlflow_run.json":  # where the run stands in its experiment is of today
            place = [now.pop(key) for key in ("key", "settings", "parent_id", "experiment_id")]
            assert all(place)
        assert form_of(now) == form_of(then), file
    assert (run / "checkpoints" / "latest").readlink() == (before / "checkpoints" / "latest").readlink()


def test_finetuning_from_a_run(read: tuple[Path, dict[str, str]]) -> None:
    """On others' tars, at another resolution: the head by WordNet id, filters resized, rates by layer."""
    folder, said = read
    assert "2 of 3 classes from the source by WordNet id" in said["finetune"]
    compare_lines(log_lines(folder / "runs" / "finetune" / "log.jsonl"), EXPECTED["finetuned"])


def compare_lines(lines: list[dict[str, float]], before: list[dict[str, float]]) -> None:
    assert [line["step"] for line in lines] == [line["step"] for line in before]
    for line, other in zip(lines, before, strict=True):
        assert other.keys() <= line.keys()
        for key, tolerance in (("loss", LOSS), ("val_loss", LOSS), ("lr", 1e-6), ("grad_norm", NORM)):
            if key in other:
                assert line[key] == pytest.approx(other[key], rel=tolerance), (key, line["step"])


def tensors(run: Path) -> dict[str, np.ndarray]:
    """All state of the run's last checkpoint."""
    files = sorted((run / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"))
    return {f"{file.name}: {name}": value for file in files for name, value in load_file(file).items()}


def form_of(tree: Any) -> Any:
    """Keys and kinds of values."""
    if isinstance(tree, dict):
        return {key: form_of(value) for key, value in tree.items()}
    return type(tree).__name__ if tree is not None else None
