"""Fixtures that several files share: small data sets built by the real command line, and the real launcher."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
# Real synsets, so that lemmas and label maps mean something; two of the four are in both sets.
SYNSETS_22K = ("n02084071", "n02121620", "n02958343", "n07739125")
SYNSETS_1K = ("n02121620", "n02958343", "n03782006")

os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests that start several ranks, or measure how long processes take to notice something. The longest come first.
RANKS = ("test_resume", "test_end_to_end", "test_engine", "test_launchers", "test_watchdog", "test_lifetime")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: RANKS.index(item.path.stem) if item.path.stem in RANKS else len(RANKS))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For the two workers of `make test`: tests of ranks in a row on one, the other files one by one on the other.

    Not by the mark xdist_group, which does nothing under pytest 9.2: pytest-xdist 3.8 renames tests for it.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ranks" if Path(file).stem in RANKS else file

    return Scheduling(config, log)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: sums have one order, and two cores serve two processes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def has_ffcv() -> bool:
    return importlib.util.find_spec("ffcv") is not None


needs_ffcv = pytest.mark.skipif(not has_ffcv(), reason="FFCV is not installed (`make setup` says what it needs)")


def drawing(wnid: str, seed: int, side: int = 48) -> bytes:
    """JPEG of a noisy picture whose shape and hue tell the class: learnable, never twice the same."""
    rng = np.random.default_rng((int(wnid[1:]), seed))
    kind = sum(map(int, wnid[1:]))
    background = Image.fromarray(rng.integers(90, 160, (side, side, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(background)
    x, y = rng.integers(4, side // 3, 2)
    box = (int(x), int(y), int(x) + side // 2, int(y) + side // 2)
    colour = tuple(int(v) for v in np.roll([230, 60, 20], kind) + rng.integers(-20, 20, 3))
    (draw.ellipse if kind % 2 else draw.rectangle)(box, fill=colour)
    file = io.BytesIO()
    background.save(file, "JPEG", quality=90)
    return file.getvalue()


def archive(path: Path, synsets: tuple[str, ...], count: int, first_seed: int = 0) -> Path:
    """A tar of per-synset tars, as ImageNet comes."""

    def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(path, "w") as outer:
        for wnid in synsets:
            inner_file = io.BytesIO()
            with tarfile.open(fileobj=inner_file, mode="w") as inner:
                for i in range(count):
                    add(inner, f"{wnid}_{i}.JPEG", drawing(wnid, first_seed + i))
            add(outer, f"{wnid}.tar", inner_file.getvalue())
    return path


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m ...` in the project's root."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def launch(*arguments: str, ranks: int = 2, launcher: str = "deepspeed") -> subprocess.CompletedProcess[str]:
    """The real launcher script, on `ranks` gloo ranks."""
    return subprocess.run(
        [str(ROOT / "launch" / f"{launcher}.sh"), *arguments],
        cwd=ROOT,
        env=launch_environment(ranks),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def launch_environment(ranks: int = 2) -> dict[str, str]:
    return {**os.environ, "RANKS": str(ranks), "VENV": sys.prefix}


@dataclass(frozen=True)
class Datasets:
    """Folders of two small data sets, sharing two classes."""

    in22k: Path
    in1k: Path


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Datasets:
    return build_datasets(tmp_path_factory.mktemp("datasets"))


def build_datasets(folder: Path) -> Datasets:
    """Both sets, by the real command line."""
    folder.mkdir(exist_ok=True)
    for name, synsets in (("in22k", SYNSETS_22K), ("in1k", SYNSETS_1K)):
        train = archive(folder / f"{name}.tar", synsets, 24)
        val = archive(folder / f"{name}-val.tar", synsets, 7, first_seed=1000)
        done = run_module(
            *("data_prep", "shard", "--source", str(train), "--val-source", str(val), "--workers", "1"),
            *("--output", str(folder / name), "--samples-per-shard", "40"),
            *("--format", "both" if has_ffcv() else "webdataset"),
        )
        assert done.returncode == 0, done.stderr
    return Datasets(folder / "in22k", folder / "in1k")


def small_run(datasets: Datasets, root: Path, *more: str, stage: str = "pretrain") -> list[str]:
    """Arguments of a run of seconds: the demo's configuration with other sizes."""
    return [
        stage,
        f"configs/demo_{stage}.yaml",
        f"data.path={datasets.in22k if stage == 'pretrain' else datasets.in1k}",
        f"output_root={root}",
        *("data.resolution=32", "data.workers_per_rank=0", "train.global_batch=16", "train.micro_batch=4"),
        *("train.epochs=3", "optimizer.warmup_epochs=0.5", "evaluate.every_epochs=3", "evaluate.micro_batch=8"),
        *("checkpoint.every_steps=5", "tracking.log_every_steps=1"),
        *more,
    ]


def log_of(root: Path, name: str) -> list[dict[str, float]]:
    """The lines of a run's log.jsonl that carry a training loss."""
    lines = [json.loads(line) for line in (root / name / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.fixture
def data_workers() -> Callable[[], list[psutil.Process]]:
    """This process's children that were not there before the test."""
    before = {child.pid for child in psutil.Process().children()}
    return lambda: [child for child in psutil.Process().children() if child.pid not in before]


@dataclass(frozen=True)
class ObjectStore:
    """A real S3 API on this machine, with one bucket named `bucket`."""

    environment: dict[str, str]
    client: Any

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket="bucket", Key=key, Body=data)

    def digests(self, prefix: str) -> dict[str, str]:
        """SHA-256 of every object below the prefix, by the rest of its key."""
        listed = self.client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
        return {
            entry["Key"].removeprefix(prefix): hashlib.sha256(
                self.client.get_object(Bucket="bucket", Key=entry["Key"])["Body"].read()
            ).hexdigest()
            for entry in listed
        }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[ObjectStore]:
    """One server for all tests: its buckets are global to the process."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="bucket")
    yield ObjectStore(environment, client)
    server.stop()


@pytest.fixture
def s3(s3_server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """The store, with this process's s3fs pointed to it and nothing in its bucket."""
    import s3fs

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3_server
    for entry in s3_server.client.list_objects_v2(Bucket="bucket").get("Contents", []):
        s3_server.client.delete_object(Bucket="bucket", Key=entry["Key"])
    s3fs.S3FileSystem.clear_instance_cache()
