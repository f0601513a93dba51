"""Faults planted on hosts of their own, as many at once as do not hide each other: doctor names each with its host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.cluster import Cluster, why_not
from tests.support.datasets import Datasets
from tests.support.runs import ROOT

BATCH = ("data.resolution=32", "train.global_batch=16", "train.micro_batch=4")
# What nvidia-smi says of one GPU to each of our queries.
NVIDIA_SMI = """
case "$1" in
  *index,*) for i in $(seq 0 $(({count} - 1))); do echo "$i, GPU-$i, NVIDIA H100, 570.1, 81559, 4"; done ;;
  *ecc*) echo "GPU-0, {ecc}" ;;
esac
"""

LISTENER = """
import socket, time
listener = socket.create_server(("", 29500))
print("there", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        if os.environ.get("CI"):
            pytest.fail(f"several hosts have to be tried here: {reason}")
        pytest.skip(reason)
    with Cluster(4, tmp_path_factory.mktemp("cluster")) as hosts:
        yield hosts


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def doctor(cluster: Cluster, datasets: Datasets, output: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and what --json prints, on node1."""
    command = [sys.executable, "-m", "pipeline", "doctor", "configs/demo_pretrain.yaml", f"data.path={datasets.in22k}"]
    process = cluster.start(
        "node1",
        *(*command, f"output_root={output}", *BATCH, "--json", *more),
        cwd=ROOT,
        environment={name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "HOSTFILE")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    told, said = process.communicate(timeout=180)
    assert told, said.decode()
    return process.returncode, json.loads(told)


def bad(told: dict[str, Any]) -> dict[str, list[str]]:
    """ "status check of hosts": texts."""
    found: dict[str, list[str]] = {}
    for finding in told["findings"]:
        if finding["status"] != "pass":
            key = f"{finding['status']} {finding['check']}: {','.join(finding['hosts'])}"
            found.setdefault(key, []).append(finding["text"])
    return found


@contextmanager
def covered(cluster: Cluster, host: str, target: Path | str, by: Path | None, *options: str) -> Iterator[None]:
    """`target` is something else on one host: `by`, or with None a file system of its own."""
    what = ["--bind", str(by)] if by else ["-t", "tmpfs", "none"]
    cluster.run(host, "mount", *options, *what, str(target))
    try:
        yield
    finally:
        cluster.run(host, "umount", str(target))


@contextmanager
def running(cluster: Cluster, host: str, script: str) -> Iterator[None]:
    """A Python script that prints a line when it is where it should be, and would then sleep."""
    process = cluster.start(host, sys.executable, "-c", script, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield
    finally:
        for child in psutil.Process(process.pid).children():  # nsenter's
            child.kill()
        process.wait()


def changed(folder: Path, source: Path, *change: tuple[str, str]) -> Path:
    """A copy of a text file with other words in it."""
    text = source.read_text()
    for old, new in change:
        assert old in text
        text = text.replace(old, new, 1)
    copy = folder / f"changed-{source.name}"
    copy.write_text(text)
    return copy


def test_healthy_hosts(cluster: Cluster, datasets: Datasets, output: Path) -> None:
    code, told = doctor(cluster, datasets, output, "--hostfile", str(cluster.hostfile(2, ["node1", "node2"])))
    statuses = {finding["check"]: finding["status"] for finding in told["findings"]}
    # How fast this machine is while others use it is not asked here.
    assert statuses.pop("all-reduce") in ("pass", "warn"), told["findings"]
    assert (code, set(statuses.values())) == (0, {"pass"}), bad(told)
    assert {"hosts", "clocks", "host names", "port", "versions", "checkout", "data", "batch", "disk"} <= set(statuses)
    (text,) = [finding["text"] for finding in told["findings"] if finding["check"] == "all-reduce"]
    assert text.startswith("2 ranks, gloo: ")
    assert "Gbit/s at 64 MiB" in text
    assert os.listdir(output) == []
    assert [len(cluster.processes(host)) for host in ("node1", "node2")] == [0, 0]


def test_faults_of_files_and_machines(cluster: Cluster, datasets: Datasets, output: Path, tmp_path: Path) -> None:
    run = output / "demo-pretrain"
    run.mkdir()
    metadata = (
        Path(str(distribution("timm").locate_file(""))) / f"timm-{distribution('timm').version}.dist-info/METADATA"
    )
    older = changed(tmp_path, metadata, (f"\nVersion: {distribution('timm').version}\n", "\nVersion: 0.9.1\n"))
    manifest = changed(tmp_path, datasets.in22k / "dataset.json", ('"name": "', '"name": "other-'))
    shards = tmp_path / "shards"
    shutil.copytree(datasets.in22k, shards)
    (shards / "train-000001.tar").unlink()
    with open(shards / "train-000000.tar", "r+b") as file:
        file.truncate(512)
    # Python runs lines of .pth files at its start, in an environment twice: on one host alone it is five minutes later.
    site = next(Path(sysconfig.get_path("purelib")).glob("*.pth"))
    clock = tmp_path / "clock.pth"
    later = 'time.time = vars(time).setdefault("later", (lambda now: lambda: now() + 300)(time.time))'
    clock.write_text(f"{site.read_text()}\nimport time; {later}\n")
    programs = {}
    for host, count, ecc in (("node1", 2, 0), ("node2", 1, 3), ("node3", 2, 0)):
        programs[host] = tmp_path / f"programs-{host}"
        programs[host].mkdir()
        path = programs[host] / "nvidia-smi"
        path.write_text("#!/bin/bash\n" + NVIDIA_SMI.format(count=count, ecc=ecc))
        path.chmod(0o755)
    (tmp_path / "no_keys").touch()
    hosts = cluster.folder / "hosts.node3"
    names = hosts.read_text()
    with ExitStack() as planted:
        plant = planted.enter_context
        plant(covered(cluster, "node2", metadata, older))
        plant(covered(cluster, "node2", datasets.in22k / "dataset.json", manifest))
        plant(covered(cluster, "node3", datasets.in22k, shards))
        plant(covered(cluster, "node3", run, None, "-o", "size=16k"))
        plant(covered(cluster, "node2", output, output, "-o", "ro"))
        plant(covered(cluster, "node2", site, clock))
        plant(covered(cluster, "node4", cluster.folder / "authorized_keys", tmp_path / "no_keys"))
        for host, folder in programs.items():
            plant(covered(cluster, host, "/usr/local/bin", folder))
        cluster.run("node3", "bash", "-c", f"head -c 16k /dev/zero > {run}/filler || true")
        plant(running(cluster, "node1", LISTENER))
        hosts.write_text(names.replace(cluster.address("node3"), "127.0.1.1"))  # in place: it is mounted
        planted.callback(hosts.write_text, names)
        code, told = doctor(
            *(cluster, datasets, output, "--hostfile", str(cluster.hostfile(2)), "--fast"),
            *("tracking.uri=http://machine:9", "train.micro_batch=8", "train.global_batch=24"),
        )
    found = bad(told)
    assert code == 1

    def text(key: str) -> str:
        assert key in found, found
        return "; ".join(found.pop(key))

    assert "Permission denied (publickey" in text("fail hosts: node4")
    assert "timm: " in (versions := text("fail versions: node2"))
    assert "0.9.1 on node2" in versions
    assert "5.0 minutes ahead" in text("fail clocks: node2")
    assert "node3, is 127.0.1.1 there" in text("fail host names: node3")
    assert "MASTER_PORT=29500: the port is in use on this host (by process" in text("fail port: node1")
    assert "digest of dataset.json" in text("fail manifest: node2")
    shard = text("fail shards: node3")
    assert f"{datasets.in22k}/train-000001.tar is missing" in shard
    assert "train-000000.tar has 512 bytes, the manifest says" in shard
    gpus = text("fail GPUs: node2")
    assert "unequal numbers of GPUs: 2 on node1, node3; 1 on node2" in gpus
    assert "2 slots, 1 GPUs" in gpus
    assert "GPU 0: 3 uncorrected ECC errors" in text("fail GPU health: node2")
    assert "24 is not divisible by 8 ranks x train.micro_batch 8" in text("fail batch: ")
    assert f"{run}: 0 bytes free, it is full" in text("fail disk: node3")
    folder = f"{run} cannot be written to"
    assert f"{folder}: Read-only file system" in text("fail checkpoint folder: node2")
    assert f"{folder}: No space left on device" in text("fail checkpoint folder: node3")
    assert "machine:9 does not answer" in text("warn MLflow: node1")
    found.pop("warn limits: ", None)
    assert found == {}
    assert os.listdir(run) == []


def test_folder_of_its_own_and_live_writer(cluster: Cluster, datasets: Datasets, output: Path) -> None:
    """A folder that is not shared, though each host can write into it; and a run that goes on."""
    run = output / "demo-pretrain"
    run.mkdir()
    hold = (
        f"import fcntl, os, time; f = open({str(run / '.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "f.write(f'process {os.getpid()} on node3'); f.flush(); print(1, flush=True); time.sleep(600)"
    )
    hostfile = cluster.hostfile(1, ["node1", "node2"])
    with covered(cluster, "node2", output, None), running(cluster, "node3", hold):
        cluster.run("node2", "mkdir", str(run))
        code, told = doctor(cluster, datasets, output, "--hostfile", str(hostfile), "--fast")
    assert code == 1
    found = bad(told)
    assert found.pop("fail checkpoint folder: node2") == [f"{run} is another folder than on node1"]
    (text,) = found.pop("fail run folder: ")
    assert text.startswith(f"{run} is being written by process ")
    assert text.endswith(" on node3")
    assert found == {}
    # What a dead writer has left is in nobody's way.
    assert (run / ".lock").read_text()
    code, told = doctor(cluster, datasets, output, "--hostfile", str(hostfile), "--fast")
    assert (code, bad(told)) == (0, {})


def test_hosts_that_cannot_take_part(cluster: Cluster, datasets: Datasets, output: Path, tmp_path: Path) -> None:
    """No environment, a name that is no host, one host under two names."""
    hostfile = tmp_path / "hostfile"
    names = ["node1", cluster.address("node1"), "node2", "nowhere"]
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
    with covered(cluster, "node2", sys.prefix, None):
        code, told = doctor(cluster, datasets, output, "--hostfile", str(hostfile), "--fast")
    assert code == 1
    found = bad(told)
    (text,) = found.pop("fail hosts: node2")
    assert text.startswith("the checkout or its environment does not start there")
    (text,) = found.pop("fail hosts: nowhere")
    assert "Could not resolve hostname nowhere" in text
    assert found.pop(f"fail host names: node1,{names[1]}") == ["names of one and the same host"]
    assert found == {}
