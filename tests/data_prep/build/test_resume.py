"""Interruptions of `data_prep shard`: kills of anything at any moment, lost schedulers, full disks, object stores."""

from __future__ import annotations

import gzip
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_prep.manifest import Manifest
from tests.support.archives import WNIDS, archive, command, digests, image_bytes, run, shard, tar_bytes
from tests.support.processes import PATIENCE_SECONDS, wait_for
from tests.support.runs import ROOT

KILLS = 10


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """600 images of 30 kB, so that a build takes a while and has many chunks."""
    path = tmp_path_factory.mktemp("source") / "source.tar"
    rng = np.random.default_rng(1)
    members = {}
    for wnid in WNIDS:
        images = {f"{wnid}_{i}.JPEG": image_bytes(int(rng.integers(1 << 30)), (900, 700)) for i in range(200)}
        members[f"{wnid}.tar"] = tar_bytes(images)
    path.write_bytes(tar_bytes(members))
    return path


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run(command(source, output, "--workers", "1"))
    assert done.returncode == 0, done.stderr
    assert Manifest.load(output).split("train").samples == 585
    return digests(output)


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def test_killed_at_random_moments_gives_the_same_bytes(source, undisturbed, tmp_path):
    choose = random.Random(0)
    kills = dict.fromkeys(("command", "worker"), 0)
    finished = 0
    while sum(kills.values()) < KILLS or not finished:
        output = tmp_path / f"out{finished}"
        victim, workers = (("command", "1"), ("worker", "2"), ("command", "2"))[sum(kills.values()) % 3]
        # Moments from before the first file to well into the shards, whatever this machine's speed.
        wanted_files = _files(output) + choose.randrange(0, 25)
        process = subprocess.Popen(
            command(source, output, "--workers", workers), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while process.poll() is None and sum(kills.values()) < KILLS:
            found = [child for child in descendants(process.pid) if "spawn_main" in " ".join(_command_line(child))]
            if _files(output) < wanted_files or (victim == "worker" and not found):
                time.sleep(0.01)
                continue
            if victim == "worker":
                with suppress(psutil.NoSuchProcess):
                    found[choose.randrange(len(found))].kill()
            else:
                process.send_signal(signal.SIGKILL)
                process.wait()
                assert not psutil.wait_procs(found, timeout=PATIENCE_SECONDS)[1], "workers outlive their command"
                # Whatever has its final name is complete.
                there = digests(output) if output.exists() else {}
                assert {n: d for n, d in there.items() if not n.startswith(".")}.items() <= undisturbed.items()
            kills[victim] += 1
            break
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        if process.returncode == 0:
            assert digests(output) == undisturbed
            assert not (output / ".data_prep").exists()
            finished += 1
        else:
            assert process.returncode == -signal.SIGKILL, errors.decode()
    assert min(kills.values()) > 0


def under_way(build: list[str], output: Path, more: int) -> subprocess.Popen[str]:
    """A build that has written so many more files; from the start, where it was over before that was seen."""
    while True:
        process = subprocess.Popen(
            build, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        wanted = _files(output) + more
        while process.poll() is None and _files(output) < wanted:
            time.sleep(0.005)
        if process.poll() is None:
            return process
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        shutil.rmtree(output)


def test_killed_while_a_compressed_archive_is_spooled(source, undisturbed, tmp_path):
    zipped, output = tmp_path / "source.tar.gz", tmp_path / "out"
    zipped.write_bytes(gzip.compress(source.read_bytes(), 1))
    build = command(zipped, output, "--workers", "1")
    for more in (3, 9, 15):
        process = under_way(build, output, more)
        process.kill()
        process.wait()
    (damaged := tmp_path / "cut.tar.gz").write_bytes(zipped.read_bytes()[:-5000])
    done = run(command(damaged, output, "--workers", "1"))
    assert done.returncode == 1
    assert "unfinished build with other settings: source (" in done.stderr.splitlines()[-1]
    assert run(build).returncode == 0
    # The ledger's row groups are the chunks, and those are cut otherwise.
    other = ("dataset.json", "ledger.parquet")
    assert {n: d for n, d in digests(output).items() if n not in other} == {
        n: d for n, d in undisturbed.items() if n not in other
    }


def counting(program: list[str]) -> list[str]:
    """The same command; at its end it tells the bytes that it inflated. Places to begin again are near each other."""
    code = """
import sys
from data_prep import __main__
from data_prep.sources import gunzip

gunzip.PLACE_EVERY_BYTES, plain, inflated = 1 << 20, gunzip._decompress, 0

def counted(inflate, data):
    global inflated
    out = plain(inflate, data)
    inflated += len(out)
    return out

gunzip._decompress = counted
if __name__ == "__main__":  # not in the workers
    code = __main__.main(sys.argv[1:])
    print("inflated", inflated)
    sys.exit(code)
"""
    at = program.index("data_prep")
    return [program[0], "-c", code, *program[at + 1 :]]


def test_a_build_killed_late_does_not_inflate_from_the_start(source, tmp_path):
    with tarfile.open(source) as outer:
        images = []
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                images += [inner.extractfile(image).read() for image in inner if image.isfile()]
    classes = {f"n{n:08d}.tar": {f"n{n:08d}_{i}.JPEG": d for i, d in enumerate(images[n::20])} for n in range(20)}
    data = tar_bytes({name: tar_bytes(members) for name, members in classes.items()})
    zipped, output = tmp_path / "source.tar.gz", tmp_path / "out"
    zipped.write_bytes(gzip.compress(data, 6))
    build = counting(command(zipped, output, "--workers", "1"))
    whole = run(build)
    assert whole.returncode == 0, whole.stderr
    wanted = digests(output)
    shutil.rmtree(output)
    process = subprocess.Popen(build, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and _chunks(output) < 24:  # of 33
        time.sleep(0.002)
    assert process.poll() is None, "it is killed before its end"
    process.kill()
    process.wait()
    done = run(build)
    assert done.returncode == 0, done.stderr
    assert digests(output) == wanted
    assert "source.tar.gz: unpacking goes on from byte " in done.stderr
    inflated = [int(one.stdout.split("inflated ")[1]) for one in (whole, done)]
    assert inflated[0] >= len(data)
    assert inflated[1] < 0.5 * len(data), "the second run inflates the rest alone"


def _files(output: Path) -> int:
    return sum(len(folders) + len(files) for _, folders, files in os.walk(output))


def _chunks(output: Path) -> int:
    return len(list(output.glob(".data_prep/chunks/*.parquet")))


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@contextmanager
def dask(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dask", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        for child in [*descendants(process.pid), psutil.Process(process.pid)] if process.poll() is None else []:
            child.kill()
        process.wait()


def test_dask_cluster_loses_a_worker_then_its_scheduler(source, undisturbed, tmp_path):
    file, output = str(tmp_path / "scheduler.json"), tmp_path / "out"
    scheduler = ("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", file)
    worker = ("worker", "--scheduler-file", file, "--nthreads", "1", "--no-dashboard", "--no-nanny")
    build = command(source, output, "--scheduler", file)
    with dask(*scheduler) as first_scheduler, dask(*worker) as first, dask(*worker):
        wait_for(lambda: os.path.exists(file))
        process = subprocess.Popen(build, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: _chunks(output) >= 2, process)
        first.kill()
        wait_for(lambda: _chunks(output) >= 8, process)
        first_scheduler.kill()
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 1
        assert "scheduler" in errors.splitlines()[-1]
        assert "give the same command again" in errors.splitlines()[-1]
    os.unlink(file)
    kept = _chunks(output)
    with dask(*scheduler), dask(*worker) as second, dask(*worker):
        wait_for(lambda: os.path.exists(file))
        process = subprocess.Popen(build, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: _chunks(output) > kept, process)
        second.kill()
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, errors
    assert digests(output) == undisturbed


def test_ctrl_c_ends_the_command_and_its_workers_with_one_line(source, undisturbed, tmp_path):
    output = tmp_path / "out"
    build = command(source, output, "--workers", "2")
    for more in (1, 7, 13):
        process = under_way(build, output, more)
        workers = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        assert errors.splitlines()[-1] == "error: interrupted; the same command goes on from there"
        assert not psutil.wait_procs(workers, timeout=PATIENCE_SECONDS)[1]
    assert run(build).returncode == 0
    assert digests(output) == undisturbed


def test_no_scheduler_is_one_clear_line(source, tmp_path):
    done = run(command(source, tmp_path / "out", "--scheduler", "tcp://127.0.0.1:1"))
    assert done.returncode == 1
    assert "no Dask scheduler answers at tcp://127.0.0.1:1" in done.stderr.splitlines()[-1]


def test_other_settings_into_an_unfinished_build_are_refused(tmp_path, capsys):
    source, out = archive(tmp_path / "s.tar", extra={f"bad{i}.JPEG": b"" for i in range(9)}), tmp_path / "out"
    assert shard(source, out) == 3  # too many rejects: an unfinished build
    capsys.readouterr()
    assert shard(source, out, "--quality", "80", "--max-reject", "1") == 1
    assert "unfinished build with other settings: quality (90 there, 80 now)" in capsys.readouterr().err
    assert shard(source, out, "--quality", "80", "--max-reject", "1", "--force") == 0
    assert Manifest.load(out).settings["quality"] == 80


def test_unfinished_work_elsewhere_leaves_what_is_there(tmp_path):
    source, scratch = archive(tmp_path / "s.tar", extra={f"bad{i}.JPEG": b"" for i in range(9)}), tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "theirs").write_text("precious")
    assert shard(source, tmp_path / "out", "--work", str(scratch)) == 3
    assert len(list(scratch.iterdir())) == 2
    assert not (tmp_path / "out" / ".data_prep").exists()
    assert shard(source, tmp_path / "out", "--work", str(scratch), "--max-reject", "1") == 0
    assert [path.name for path in scratch.iterdir()] == ["theirs"]


def test_full_disk_is_clear_and_resumable(source, undisturbed, tmp_path):
    output = tmp_path / "out"

    def run_limited(limit_bytes: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(source, output, "--workers", "1"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
        )

    for limit_bytes in (100_000, 250_000):  # in stage 1, then in stage 2
        done = run_limited(limit_bytes)
        assert done.returncode == 1, done.stderr
        assert "make room in the output folder, then give the same command again" in done.stderr.splitlines()[-1]
    assert run(command(source, output, "--workers", "1")).returncode == 0
    assert digests(output) == undisturbed


def test_from_and_to_an_object_store(source, undisturbed, tmp_path, s3):
    s3.put("raw/source.tar", source.read_bytes())
    done = run(command("s3://bucket/raw/source.tar", "s3://bucket/sets/out", "--workers", "2"), **s3.environment)
    assert done.returncode == 0, done.stderr
    there = s3.digests("sets/out/")
    assert not [name for name in there if ".data_prep" in name]
    here = {name: digest for name, digest in undisturbed.items() if name != "dataset.json"}
    assert {name: digest for name, digest in there.items() if name != "dataset.json"} == here
    again = run(command(source, "s3://bucket/sets/out", "--workers", "1"), **s3.environment)
    assert "already built" in again.stdout, again.stderr
