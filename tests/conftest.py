"""Fixtures that several files share, and which tests run beside which."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported. Two workers share the cores: a rank alone on a host takes a thread for each core, and OpenMP
# threads that wait for one another spin. The limit is what ranks heed.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_THREAD_LIMIT", "1")
pytest.register_assert_rewrite("tests.support")  # before it is imported

from tests.support.datasets import Datasets, build_datasets  # noqa: E402
from tests.support.object_store import ObjectStore  # noqa: E402
from tests.support.processes import Workers, children  # noqa: E402

TESTS = Path(__file__).parent
# Tests that start several ranks, or measure how long processes take to notice something. The longest come first.
RANKS = [
    TESTS / file
    for file in (
        "pipeline/training/test_resume.py",
        "test_end_to_end.py",
        "gpu/test_dry_run.py",
        "pipeline/training/test_engine.py",
        "launch/test_slurm.py",
        "launch/test_launchers.py",
        "pipeline/evaluation/test_command.py",
        "pipeline/ranks/test_watchdog.py",
        "pipeline/ranks/test_lifetime.py",
        "pipeline/doctor/test_hosts.py",
    )
]
assert all(map(Path.is_file, RANKS)), "a file of RANKS is gone: name it anew"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: RANKS.index(item.path) if item.path in RANKS else len(RANKS))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For the two workers of `make test`: tests of ranks in a row on one, the other files one by one on the other.

    Not by the mark xdist_group, which does nothing under pytest 9.2: pytest-xdist 3.8 renames tests for it.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ranks" if config.rootpath / file in RANKS else file

    return Scheduling(config, log)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: sums have one order, and two cores serve two processes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Datasets:
    return build_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def data_workers() -> Workers:
    """This process's running children that were not there before the test."""
    before = {child.pid for child in children()}
    return lambda: [child for child in children() if child.pid not in before]


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
