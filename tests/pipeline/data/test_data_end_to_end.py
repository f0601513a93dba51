"""Whole runs on data that is remote or damaged: the real launcher, two ranks, a real object store."""

import json
from pathlib import Path

import pytest

from tests.support.datasets import Datasets
from tests.support.loading import ON_DEVICE, damage, read, same_images
from tests.support.object_store import ObjectStore
from tests.support.runs import launch, log_of, run_module, small_run
from tests.support.web import web_server

SKIP = ("augment.where=device", "data.on_bad_sample=skip")


def losses(root: Path, name: str) -> list[float]:
    return [line["loss"] for line in log_of(root, name)]


def test_remote_shards_with_bad_samples_train_as_local_ones(
    datasets: Datasets, tmp_path: Path, s3: ObjectStore
) -> None:
    """From S3 with workers, and from the disk without: the same losses, the same stand-ins, one ledger a rank."""
    broken = damage(datasets, tmp_path, 0, 3)
    for file in broken.iterdir():
        if file.is_file() and file.suffix != ".beton":
            s3.put(f"in22k/{file.name}", file.read_bytes())
    ways = {
        "disk": (f"data.path={broken}", "data.workers_per_rank=0"),
        "s3": ("data.path=s3://bucket/in22k", f"data.cache_folder={tmp_path / 'cache'}", "data.workers_per_rank=2"),
    }
    for name, way in ways.items():
        done = launch(*small_run(datasets, tmp_path / "runs", f"name={name}", *SKIP, *way))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "BAD SAMPLES" in done.stdout
    runs = tmp_path / "runs"
    assert len(losses(runs, "disk")) == 18
    assert losses(runs, "s3") == losses(runs, "disk")
    ledgers = [sorted((runs / name / "bad_samples").glob("rank-*.jsonl")) for name in ways]
    lines = [[json.loads(line) for path in paths for line in path.read_text().splitlines()] for paths in ledgers]
    seen = [[(line["epoch"], line["step"], line["sample"], line["stand_in"]) for line in ledger] for ledger in lines]
    assert seen[0] == seen[1]
    assert {line[2] for line in seen[0]} == {0, 3}
    assert "s3://bucket/in22k/train-000000.tar: sample 'n" in lines[1][0]["error"]
    # 96 samples fill six batches of 16: each epoch meets both.
    assert log_of(runs, "s3")[-1]["bad_samples"] == 2
    cached = {path.name.partition("-")[2] for path in (tmp_path / "cache").glob("*.tar")}
    assert any(name.startswith("train-") for name in cached)


def test_too_many_bad_samples_end_the_run(datasets: Datasets, tmp_path: Path) -> None:
    broken = damage(datasets, tmp_path, *range(6))
    arguments = (f"data.path={broken}", "name=limit", *SKIP, "data.bad_samples_max=4")
    done = launch(*small_run(datasets, tmp_path, *arguments))
    assert done.returncode == 1
    assert "training samples of this epoch could not be read, data.bad_samples_max is 4" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_remote_set_with_a_shard_missing_is_refused_before_the_start(
    datasets: Datasets, tmp_path: Path, s3: ObjectStore
) -> None:
    for file in datasets.in22k.iterdir():
        if file.is_file() and file.suffix != ".beton" and file.name != "train-000001.tar":
            s3.put(f"in22k/{file.name}", file.read_bytes())
    done = launch(*small_run(datasets, tmp_path, "data.path=s3://bucket/in22k"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(
        "error: s3://bucket/in22k/train-000001.tar is named by dataset.json but missing: copy it there or rebuild\n"
    )


@pytest.mark.parametrize("lists", [True, False])
def test_a_web_server(datasets: Datasets, tmp_path: Path, lists: bool) -> None:
    """Checked before the start, with and without a listing, and the same bytes as from the disk."""
    with web_server(datasets.in22k.parent, lists) as address:
        options = (f"data.path={address}/in22k", f"data.cache_folder={tmp_path}", ON_DEVICE)
        done = run_module("pipeline", *small_run(datasets, tmp_path, *options), "--check")
        assert (done.returncode, done.stderr) == (0, "")
        found = read(datasets, 0, 2, *options)
        assert same_images(found, read(datasets, 0, 2, ON_DEVICE))
        done = run_module("pipeline", *small_run(datasets, tmp_path, options[0] + "-none"), "--check")
        assert done.returncode == 1
        assert "http://127.0.0.1" in done.stderr
        assert done.stderr.count("\n") == 1
