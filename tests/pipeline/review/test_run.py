"""Run folders in every state: read as far as they go, and a page of them."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.storage import atomic_write
from pipeline.review.evaluations import picture_uri, read_evaluations
from pipeline.review.lineage import Lineage
from pipeline.review.log import Column, Log, curves, read_log, thinned
from pipeline.review.run import find_runs, read_run
from pipeline.review.timeline import read_timeline
from tests.support.made_up_evaluations import make_evaluation
from tests.support.made_up_runs import make_chain, make_run
from tests.support.read_only import run_beside
from tests.support.runs import run_module


def log_file(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(lines))
    return path


def line(step: int, **more: object) -> bytes:
    return json.dumps({"time": 1.7e9 + step, "step": step, **more}).encode() + b"\n"


def test_what_can_be_read_of_a_damaged_log(tmp_path: Path) -> None:
    path = log_file(
        tmp_path / "log.jsonl",
        line(1, loss=2.5, lr=0),
        b"\x00\xff garbage\n",
        line(2, loss=math.nan, note="text", good=True, nothing=None),
        b'{"step": 3}\n[]\n"text"\n{"step": NaN, "time": 1}\n{"step": true, "time": 1}\n{"step": 1e400, "time": 1}\n',
        b'{"time": 1, "step": 4, "huge": 1' + b"0" * 200_000 + b"}\n",
        line(5, loss=10**400, lr=1e-3),
        line(6, loss=1.5)[:-9],
    )
    log = read_log(path)
    assert log.steps.tolist() == [1, 2, 5]
    assert log.damaged == 9
    assert log.columns["loss"].rows.tolist() == [0, 1, 2]
    assert log.columns["loss"].values.tolist() == pytest.approx([2.5, math.nan, math.inf], nan_ok=True)
    assert log.columns["lr"].rows.tolist() == [0, 2]
    assert not {"note", "good", "nothing", "huge"} & set(log.columns)
    assert len(read_log(tmp_path / "none").steps) == len(read_log(log_file(tmp_path / "empty")).steps) == 0


def test_thinning_keeps_what_stands_out() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=50_000)
    values[[7, 20_000, 49_990]] = 50.0, -60.0, math.nan
    steps = np.arange(1, 50_001)
    log = Log(steps, steps.astype(float), {"loss": Column(np.arange(50_000), values)}, 0)
    curve = curves(log, 500)["loss"]
    assert len(curve.rows) < 1010
    assert {0, 7, 20_000, 49_990, 49_999} <= set(curve.rows.tolist())
    assert np.array_equal(curve.values, values[curve.rows], equal_nan=True)
    assert curve.means is not None
    assert np.nanmean(values) == pytest.approx(np.mean(curve.means), abs=1e-3)
    even = thinned(log, Column(np.arange(50_000), np.full(50_000, 3.0)), 500)
    assert len(even.rows) == 2
    assert len(thinned(log, Column(np.arange(50_000), np.full(50_000, math.nan)), 500).rows) < 1010
    assert len(thinned(log, Column(np.arange(900), values[:900]), 500).rows) == 900


def test_the_hours_add_up(tmp_path: Path) -> None:
    """Two stops of two hours each, ten evaluations of ten seconds, and a slow loader: nothing is counted twice."""
    run = make_run(tmp_path, "run", steps=3000, seed=3, faults=True)
    log = read_log(run / "log.jsonl")
    timeline = read_timeline(run, log, 4096.0)
    spent = timeline.spent
    assert spent.stopped == pytest.approx(4 * 3600, rel=0.01)
    assert spent.evaluation == pytest.approx(100, abs=1)
    assert spent.data > 30
    first = 4096 / log.columns["images_per_second"].values[0]
    assert sum(spent) == pytest.approx(log.times[-1] - log.times[0] + first, abs=0.01)
    assert timeline.hours[-1] * 3600 == pytest.approx(sum(spent) - spent.stopped, abs=0.01)
    assert [event.kind for event in timeline.events].count("resumed") == 2
    assert len(timeline.running) == 3
    # Without events a long gap says it too.
    (run / "events.txt").unlink()
    untold = read_timeline(run, log, 4096.0)
    assert untold.spent.stopped == pytest.approx(4 * 3600, rel=0.02)
    (run / "events.txt").write_bytes(b"\xff\n2023-99-99 00:00:00 +0000  step 1  LEFT OUT\nstep 1\n" + b"x" * 3_000_000)
    assert [event.kind for event in read_timeline(run, log, None).events] == ["not-finite"]


def test_half_written_folders(tmp_path: Path) -> None:
    """Each of them is a run, and the page of them all is written."""
    whole = make_run(tmp_path, "whole", steps=60)
    for name, files in {
        "config-alone": {"config.yaml": "name: config-alone\n"},
        "no-lines": {"config.yaml": "a: [1, 2", "log.jsonl": ""},
        "half-a-line": {"log.jsonl": '{"time": 1.7e9, "st'},
        "not-finite": {"log.jsonl": '{"time": 1.7e9, "step": 1, "loss": NaN, "epoch": NaN, "images_per_second": 0}\n'},
        "wrong-kinds": {
            "log.jsonl": '{"time": 1.7e9, "step": 1, "loss": 2}\n',
            "config.yaml": "train: text\nmodel: [1]\n",
            "summary.json": "[]",
            "dataset.json": '{"dataset_id": 7, "splits": [1], "synsets": 3, "settings": "x"}',
            "mlflow_run.json": '{"uri": 3}',
            "events.txt": "\n\n",
        },
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    broken = make_evaluation(whole, "broken", 60)
    (broken / "evaluation.json").write_text('{"results": {"top1_percent": null}, "worst_pairs": [3], "confusion": []}')
    (broken / "per_class.csv").write_bytes(b"\x00,\xff\n1,2\n")
    (whole / "evaluations" / "none").mkdir()
    (whole / "checkpoints" / "step-00000060" / "checkpoint.json").write_text('{"step": "x", "files": [], "metrics": 3}')
    for path in find_runs([tmp_path]):
        read_run(path)
    done = run_module("pipeline", "review", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"open in a browser: {(tmp_path / 'review.html').as_uri()}\n")
    assert "6 runs" in done.stdout


def test_lineage(tmp_path: Path) -> None:
    """From the archive to the export, through the checkpoint that the other run started from, also when moved."""
    runs = [read_run(path)[0] for path in make_chain(tmp_path)]
    evaluations = [each for run in runs for each in read_evaluations(run.path, run.name)]
    lineage = Lineage(runs, evaluations)
    kinds = {node.id: node.kind for node in lineage.nodes}
    levels = {node.id: node.level for node in lineage.nodes}
    assert all(levels[origin] < levels[target] for origin, target in lineage.edges)
    into = {kinds[target]: kinds[origin] for origin, target in lineage.edges if kinds[origin] != "data set"}
    assert into["finetune"] == into["export"] == into["evaluation"] == "checkpoint"
    assert sum(kind == "data set" for kind in kinds.values()) == 2
    os.rename(tmp_path, tmp_path.with_name("moved"))
    moved = Lineage([read_run(path)[0] for path in find_runs([tmp_path.with_name("moved")])], [])
    assert not [node for node in moved.nodes if node.kind == "weights"]
    alone = Lineage([run for run in runs if run.stage == "finetune"], [])
    assert [node.title for node in alone.nodes if node.kind == "weights"] == ["pretrain-l-gf"]


def test_lineage_of_what_a_run_starts_from(tmp_path: Path) -> None:
    """Its own box for each way to name weights, not the newest checkpoint's for all."""
    first = make_run(tmp_path / "step-by-step", "first", steps=100)
    (first / "checkpoints" / "best").symlink_to("step-00000050")
    export = first / "exports" / "step-00000100-ema-timm"
    export.mkdir(parents=True)
    facts = {"kind": "timm", "checkpoint": {"run": "first", "step": 50}}
    (export / "export.json").write_text(json.dumps(facts))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_text(json.dumps(facts | {"kind": "safetensors"}))
    expected = {
        str(first): "step-00000100",
        str(first / "checkpoints" / "step-00000050" / "ema.safetensors"): "step-00000050",
        str(first / "checkpoints" / "best"): "step-00000050",
        str(export): export.name,
        f"/moved/first/exports/{export.name}": export.name,
        str(tmp_path / "out"): "step-00000050",
        "models:/hornet@best": export.name,
        "runs:/0123": "step-00000050",
        "models:/other@best": "other@best",
    }
    paths = [first]
    for number, init in enumerate(expected):
        paths.append(make_run(tmp_path, f"tune-{number}", steps=20, init=init))
        if init in ("models:/hornet@best", "runs:/0123"):
            (paths[-1] / "init").mkdir()
            path = "" if init.startswith("models") else str(first / "checkpoints" / "step-00000050")
            (paths[-1] / "init" / "source.json").write_text(json.dumps({"address": init, "path": path}))
            if not path:
                (paths[-1] / "init" / "export.json").write_text(json.dumps(facts))
    lineage = Lineage([read_run(path)[0] for path in paths], [])
    nodes = {node.id: node for node in lineage.nodes}
    origins = {nodes[target].title: nodes[origin] for origin, target in lineage.edges}
    by_run = {name: node for name, node in origins.items() if name.startswith("tune-")}
    assert [by_run[f"tune-{number}"].title for number in range(len(expected))] == list(expected.values())
    titles = [node.title for node in lineage.nodes if node.kind == "checkpoint" and node.about == "first"]
    assert sorted(titles) == ["step-00000050", "step-00000100"]


def test_what_the_ledger_says(tmp_path: Path) -> None:
    """Counts of the data set that the run was trained on; not those of another one that stands there now."""
    run = make_run(tmp_path / "runs", "run", steps=20)
    data = tmp_path / "data"
    data.mkdir()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("path: data/in22k", f"path: {data}"))
    manifest = json.loads((run / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(manifest))
    rows = {"action": ["kept"] * 3 + ["rejected"], "reason": ["", "", "", "truncated"], "name": list("abcd")}
    pq.write_table(pa.table(rows), data / "ledger.parquet")

    def told() -> dict[str, str]:
        (node,) = [node for node in Lineage([read_run(run)[0]], []).nodes if node.kind == "data set"]
        return dict(node.details)

    assert told()["ledger: kept"] == "3"
    assert (told()["ledger: rejected"], told()["of these, truncated"]) == ("1", "1")
    assert told()["dataset_id"] == manifest["dataset_id"]
    (data / "ledger.parquet").write_bytes(b"PAR1 not a table")
    assert "ledger: kept" not in told()
    (data / "dataset.json").write_text(json.dumps(manifest | {"dataset_id": "another"}))
    pq.write_table(pa.table(rows), data / "ledger.parquet")
    assert "ledger: kept" not in told()


def test_pictures_are_of_the_folder_and_small(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", steps=60)
    folder = make_evaluation(run, "here", 60)
    secret = tmp_path / "secret.jpg"
    secret.write_bytes((folder / "pictures" / "0000.jpg").read_bytes())
    (folder / "pictures" / "0001.jpg").unlink()
    (folder / "pictures" / "0001.jpg").symlink_to(secret)
    said = json.loads((folder / "evaluation.json").read_text())
    said["samples"][2]["file"] = "../../../secret.jpg"
    said["samples"][3]["file"] = str(secret)
    (folder / "evaluation.json").write_text(json.dumps(said))
    (evaluation,) = read_evaluations(run, "run")
    assert "pictures/0000.jpg" in evaluation.pictures
    assert not {"pictures/0001.jpg", "../../../secret.jpg", str(secret)} & set(evaluation.pictures)
    large, other = tmp_path / "large.jpg", tmp_path / "other.jpg"
    large.write_bytes(secret.read_bytes() + bytes(60_000))
    other.write_bytes(b"<svg onload=alert(1)>")
    assert picture_uri(secret) is not None
    assert picture_uri(large) is picture_uri(other) is picture_uri(tmp_path) is None


def test_what_is_refused(tmp_path: Path) -> None:
    def told(*arguments: str) -> tuple[int, str]:
        done = run_module("pipeline", "review", *arguments)
        assert done.stdout == ""
        return done.returncode, done.stderr.splitlines()[-1]

    assert told(str(tmp_path))[1].startswith(f"error: {tmp_path} has no run")
    assert told(str(tmp_path / "none"))[1].startswith(f"error: there is no folder {tmp_path}/none")
    assert told("--html", str(tmp_path))[1].endswith(f"{tmp_path}: is a folder: name a file in it")
    assert told("--html", str(tmp_path / "a" / "b.html"))[1].endswith(f"there is no folder {tmp_path}/a: make it first")
    os.mkfifo(tmp_path / "pipe")  # as /dev/null is, in whose place nobody wants a page
    assert told("--html", str(tmp_path / "pipe"))[1].endswith("the page takes its place: name a file")
    with pytest.raises(OSError, match="no plain file"), atomic_write(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()
    assert told("--newest", "0") == (
        2,
        "python -m pipeline review: error: argument --newest: 0: how many runs, from 1 to 200",
    )


def test_runs_that_somebody_else_keeps(tmp_path: Path) -> None:
    """In a folder that is read-only the page has no place: told before a log is read, and with what to do."""
    make_run(tmp_path, "run", steps=20)
    done = run_beside(tmp_path, "pipeline", "review", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {tmp_path} cannot be written to")
    assert done.stderr.endswith("name another place with --html FILE\n")


def test_runs_of_the_same_name(tmp_path: Path) -> None:
    """They are told apart by the folders above them, and keep their own evaluations."""
    roots = [tmp_path / "first", tmp_path / "second"]
    for i, root in enumerate(roots):
        make_evaluation(make_run(root, "run", steps=20, seed=i), f"evaluation-{i}", 20)
    done = run_module("pipeline", "review", *(str(root / "run") for root in roots))
    assert done.returncode == 0
    assert {"first/run", "second/run"} <= set(done.stdout.replace("│", " ").split())
    shutil.copytree(roots[0] / "run", roots[0] / "a-copy")  # of which config.yaml says the same name
    copied = run_module("pipeline", "review", str(roots[0]))
    assert {"run", "a-copy"} <= set(copied.stdout.replace("│", " ").split())
    runs = [read_run(root / "run")[0] for root in roots]
    lineage = Lineage(runs, [each for run in runs for each in read_evaluations(run.path, run.name)])
    into = {target.rpartition(":")[2]: origin for origin, target in lineage.edges if "evaluation" in target}
    assert into == {"evaluation-0": "run:0:step-00000020", "evaluation-1": "run:1:step-00000020"}


def test_a_narrow_terminal(tmp_path: Path) -> None:
    """A number that is cut would be another number: columns are left out, and named."""
    run = make_run(tmp_path, "a-run-with-a-name-that-is-longer-than-a-line-has-room-for", steps=20)
    last = read_run(run)[0].last
    done = run_module("pipeline", "review", str(run), FORCE_COLOR="1", COLUMNS="60", LINES="25")
    assert done.returncode == 0
    assert {f"{last['loss']:.4f}", f"{last['top1']:.2f}"} <= set(done.stdout.replace("│", " ").split())
    table = [line for line in done.stdout.splitlines() if "│" in line]
    assert table
    assert max(map(len, table)) <= 60
    assert "in a wider terminal, and on the page: data wait" in done.stdout


def test_the_newest_runs(tmp_path: Path) -> None:
    for i in range(3):
        make_run(tmp_path, f"run-{i}", steps=20, seed=2 - i)  # the first is the newest
    done = run_module("pipeline", "review", str(tmp_path), "--newest", "2")
    assert done.returncode == 0
    assert "the newest 2 of 3 runs" in done.stdout
    assert "run-0" in done.stdout
    assert "run-2" not in done.stdout
