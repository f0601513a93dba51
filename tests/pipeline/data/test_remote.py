"""Shards behind URLs: range requests, the cache that processes share, read-ahead, retries. The stores are real: the S3
API, and web servers of this file's own that fail as told.
"""

from __future__ import annotations

import errno
import fcntl
import http.server
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.manifest import Manifest
from pipeline.data import remote, shard_cache
from pipeline.data.remote import RemoteError, RemoteShards
from pipeline.data.shard_cache import OpenFile, OpenFiles, ShardCache
from tests.support.datasets import Datasets
from tests.support.object_store import ObjectStore
from tests.support.processes import PATIENCE_SECONDS, wait_for
from tests.support.remote import CONTENTS, ENTRIES, SHARD_BYTES, look_again, looks_of, piece
from tests.support.runs import ROOT


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.02)
    monkeypatch.setattr(remote, "_IDLE_SECONDS", 0.1)
    monkeypatch.setattr(shard_cache, "_TOUCH_SECONDS", 0.0)
    monkeypatch.setattr(shard_cache, "_SPARED_SECONDS", 0.0)
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 16_000)
    monkeypatch.setattr(remote, "_CHUNKS_IN_FLIGHT", 4)


def upload(s3: ObjectStore) -> str:
    for entry, content in zip(ENTRIES, CONTENTS, strict=True):
        s3.put(f"set/{entry.file}", content)
    return "s3://bucket/set"


def cached(folder: Path) -> list[int]:
    return sorted(int(path.name[-10:-4]) for path in folder.glob("*.tar") if not path.name.startswith("."))


def test_bytes_are_those_of_the_local_shards(datasets: Datasets, s3: ObjectStore, tmp_path: Path) -> None:
    manifest = Manifest.load(datasets.in22k)
    entries = manifest.split("train").shards
    for entry in entries:
        s3.put(f"in22k/{entry.file}", (datasets.in22k / entry.file).read_bytes())
    shards = RemoteShards("s3://bucket/in22k/", entries, manifest.dataset_id, tmp_path / "cache", 1 << 30)
    places = [
        (number, int(offset), int(size), (datasets.in22k / entry.file).read_bytes()[offset : offset + size])
        for number, entry in enumerate(entries)
        for index in [manifest.load_index(datasets.in22k, entry)]
        for offset, size in zip(index.offsets, index.sizes, strict=True)
    ]

    def read(place: tuple[int, int, int, bytes]) -> bool:
        return shards.read(*place[:3]) == place[3]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, places))
        assert shards.ranged_reads == shards.reads == len(places)
        shards.ahead(range(len(entries)))
        wait_for(lambda: cached(tmp_path / "cache") == list(range(len(entries))))
        assert all(threads.map(read, places))
    assert shards.ranged_reads == len(places)
    assert shards.bytes_from_cache == sum(size for _, _, size, _ in places)
    assert shards.bytes_fetched == sum(entry.bytes for entry in entries) + shards.bytes_from_cache
    shards.close()


def test_no_cache(s3: ObjectStore, tmp_path: Path) -> None:
    shards = RemoteShards(upload(s3), ENTRIES, "id", tmp_path / "cache", 0)
    shards.ahead([0, 1])
    piece(shards, 0)
    piece(shards, 0, SHARD_BYTES - 5, 5)
    assert shards.read(1, 10, 0) == b""
    assert not (tmp_path / "cache").exists()
    assert (shards.reads, shards.ranged_reads, shards.bytes_fetched) == (3, 3, 5005)
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()]


def read_last(shards: RemoteShards, shard: int) -> None:
    """A read that comes after all others, also by the clock of the file system, which goes in steps."""
    newest = max(path.stat().st_mtime_ns for path in shards.cache.glob("*.tar"))

    def read() -> bool:
        piece(shards, shard)
        return shards._whole.path(shard).stat().st_mtime_ns > newest

    wait_for(read)


def test_budget_and_order(s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, cache, most = upload(s3), tmp_path / "cache", [0]

    def watched(self: ShardCache, *about: Any) -> Any:
        claim = claimed(self, *about)
        files = [path.stat().st_size for path in cache.iterdir()]
        most[0] = max(most[0], sum(files))
        return claim

    claimed = ShardCache.claim
    monkeypatch.setattr(ShardCache, "claim", watched)
    shards = RemoteShards(url, ENTRIES, "id", cache, 3 * SHARD_BYTES + 10)
    looks = looks_of(shards)
    (cache / "of-somebody-else").write_bytes(b"keep me")
    shards.ahead([4, 2, 0, 1])  # the budget is smaller than the list: its tail is not downloaded
    wait_for(lambda: cached(cache) == [0, 2, 4])
    look_again(looks)
    assert cached(cache) == [0, 2, 4]
    shards.ahead([])
    wait_for(lambda: looks[-1] == [])  # from here on it touches none
    for shard in (2, 4, 0):  # least recently used first
        read_last(shards, shard)
    assert shards.ranged_reads == 0
    shards.ahead([1])
    wait_for(lambda: cached(cache) == [0, 1, 4])
    shards.ahead([0, 3])  # 0 has been there longest, but is on the list
    wait_for(lambda: 3 in cached(cache))
    assert 0 in cached(cache)
    assert len(cached(cache)) == 3
    piece(shards, 2)
    assert shards.ranged_reads == 1  # its file was evicted while open
    assert most[0] <= 3 * SHARD_BYTES + 10
    assert (cache / "of-somebody-else").read_bytes() == b"keep me"
    shards.close()
    assert not list(cache.glob(".*.tmp-*"))


def test_what_others_use_is_spared(s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "_SPARED_SECONDS", PATIENCE_SECONDS)
    url = upload(s3)
    one, two = (RemoteShards(url, ENTRIES, "id", tmp_path, 2 * SHARD_BYTES) for _ in range(2))
    looks_of_one, looks_of_two = looks_of(one), looks_of(two)
    paths = [one._whole.path(shard) for shard in (0, 1)]

    def forget() -> None:
        """As if nobody had touched them for long."""
        for path in paths:
            os.utime(path, (0, 0))

    one.ahead([0, 1])
    wait_for(lambda: cached(tmp_path) == [0, 1])
    forget()
    look_again(looks_of_one)
    assert all(path.stat().st_mtime > 0 for path in paths)
    two.ahead([2])
    look_again(looks_of_two)
    assert cached(tmp_path) == [0, 1]
    one.ahead([1])
    wait_for(lambda: looks_of_one[-1] == [1])
    forget()
    wait_for(lambda: cached(tmp_path) == [1, 2])
    one.close()
    two.close()


def test_a_smaller_budget_is_kept_to(s3: ObjectStore, tmp_path: Path) -> None:
    url = upload(s3)
    shards = RemoteShards(url, ENTRIES, "id", tmp_path, 1 << 30)
    shards.ahead([0, 1, 2, 3])
    wait_for(lambda: len(cached(tmp_path)) == 4)
    shards.close()
    shards = RemoteShards(url, ENTRIES, "id", tmp_path, 2 * SHARD_BYTES)
    shards.ahead([5])
    wait_for(lambda: 5 in cached(tmp_path) and len(cached(tmp_path)) == 2)
    shards.close()


def _read_all(shards: RemoteShards, results: Any) -> None:
    shards.ahead(range(len(ENTRIES)))
    for shard in range(len(ENTRIES)):
        piece(shards, shard)
    wait_for(lambda: len(cached(shards.cache)) == len(ENTRIES))
    for shard in range(len(ENTRIES)):
        piece(shards, shard)
    results.put((os.getpid(), shards.bytes_fetched, shards.bytes_from_cache, shards.ranged_reads))


def test_fork_while_reading_and_downloading(s3: ObjectStore, tmp_path: Path) -> None:
    """The parent's connections, threads and locks are in use when it forks; the children share its cache."""
    shards = RemoteShards(upload(s3), ENTRIES, "id", tmp_path / "cache", 1 << 30)
    shards.ahead([0, 1, 2])
    piece(shards, 5)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_read_all, args=(shards, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=PATIENCE_SECONDS) for _ in workers]
    for worker in workers:
        worker.join(PATIENCE_SECONDS)
        assert worker.exitcode == 0
    assert len({pid for pid, *_ in found}) == 3
    piece(shards, 5)
    total = shards.bytes_fetched + sum(fetched for _, fetched, _, _ in found)
    ranged = 5000 * (shards.ranged_reads + sum(ranged for *_, ranged in found))
    assert total - ranged == len(ENTRIES) * SHARD_BYTES  # each shard was downloaded once
    again = context.Process(target=_read_all, args=(shards, results))
    again.start()
    assert results.get(timeout=PATIENCE_SECONDS)[1:] == (0, 2 * len(ENTRIES) * 5000, 0)
    again.join(PATIENCE_SECONDS)
    shards.close()


def _read_at_random(shards: RemoteShards, seed: int, results: Any) -> None:
    rng, rounds = np.random.default_rng(seed), 0
    while rounds < 8 or not shards.bytes_from_cache:
        rounds += 1
        shards.ahead(rng.permutation(6)[:2].tolist())
        for _ in range(10):
            piece(shards, int(rng.integers(6)), int(rng.integers(90_000)))
    results.put((shards.bytes_from_cache, shards.bytes_fetched))


def test_processes_that_need_different_shards_stay_within_the_budget(s3: ObjectStore, tmp_path: Path) -> None:
    shards = RemoteShards(upload(s3), ENTRIES, "id", tmp_path, 3 * SHARD_BYTES)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_read_at_random, args=(shards, seed, results)) for seed in range(3)]
    for worker in workers:
        worker.start()
    most = 0
    while any(worker.is_alive() for worker in workers):
        with shards._whole.locked():
            most = max(most, sum(entry.stat().st_size for entry in os.scandir(tmp_path)))
        time.sleep(0.005)
    found = [results.get(timeout=PATIENCE_SECONDS) for _ in workers]
    for worker in workers:
        worker.join(PATIENCE_SECONDS)
        assert worker.exitcode == 0
    assert SHARD_BYTES < most <= 3 * SHARD_BYTES
    assert all(min(amounts) > 0 for amounts in found)


def test_another_process_reads_the_cache(s3: ObjectStore, tmp_path: Path) -> None:
    url = upload(s3)
    first = RemoteShards(url, ENTRIES, "id", tmp_path, 1 << 30)
    first.ahead([0, 1])
    wait_for(lambda: cached(tmp_path) == [0, 1])
    first.close()
    script = (
        "import sys; sys.path.insert(0, '.'); from pathlib import Path\n"
        "from pipeline.data.remote import RemoteShards\n"
        "from tests.support.remote import ENTRIES, look_again, looks_of, piece\n"
        f"shards = RemoteShards({url!r}, ENTRIES, 'id', Path({str(tmp_path)!r}), 1 << 30)\n"
        "looks = looks_of(shards); shards.ahead([0, 1]); look_again(looks, 1); piece(shards, 0); piece(shards, 1)\n"
        "print(shards.bytes_fetched, shards.bytes_from_cache)"  # it ends without close: no thread may hold it
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "10000"], done.stderr
    assert done.returncode == 0
    other_build = RemoteShards(url, ENTRIES, "another id", tmp_path, 1 << 30)
    piece(other_build, 0)
    assert other_build.bytes_from_cache == 0


def test_killed_while_downloading(tmp_path: Path) -> None:
    with web_server() as (url, server):
        server.gate.clear()
        context = multiprocessing.get_context("fork")
        shards = RemoteShards(url, ENTRIES, "id", tmp_path, 2 * SHARD_BYTES)
        looks = looks_of(shards)

        def download() -> None:
            shards.ahead([0])
            signal.pause()

        worker = context.Process(target=download)
        worker.start()
        wait_for(lambda: list(tmp_path.glob(".*.tmp-*")))
        shards.ahead([0])
        look_again(looks)
        assert len(list(tmp_path.glob(".*.tmp-*"))) == 1  # the worker's: it lives
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
        piece(shards, 0)
        assert shards.ranged_reads == 1
        server.gate.set()
        wait_for(lambda: cached(tmp_path) == [0])
        piece(shards, 0)
        assert shards.ranged_reads == 1
        assert not list(tmp_path.glob(".*.tmp-*"))
        shards.close()


def test_disk_full(
    s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = RemoteShards(upload(s3), ENTRIES, "id", tmp_path, 1 << 30)
    looks = looks_of(shards)
    shards.ahead([0])
    wait_for(lambda: cached(tmp_path) == [0])

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    shards.ahead([0, 1, 2, 3])
    wait_for(lambda: not shards._growing)
    look_again(looks)
    shards.ahead([3, 2])
    look_again(looks)
    piece(shards, 0)
    piece(shards, 1)
    assert (shards.bytes_from_cache, shards.ranged_reads) == (5000, 1)
    assert [path.name for path in tmp_path.glob(".*.tmp-*")] == []
    told = capfd.readouterr().err
    assert told.count("warning") == 1, told
    assert "No space left" in told
    shards.close()


def test_cache_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RemoteError, match="cannot be made"):
        RemoteShards("memory://x", ENTRIES, "id", tmp_path / "file", 1)


def test_damaged_and_removed_cache_files(s3: ObjectStore, tmp_path: Path) -> None:
    shards = RemoteShards(upload(s3), ENTRIES, "id", tmp_path, 1 << 30)
    looks = looks_of(shards)
    path = shards._whole.path(0)
    path.write_bytes(b"too short")
    piece(shards, 0)
    assert shards.ranged_reads == 1
    shards.ahead([0])
    wait_for(lambda: path.stat().st_size == SHARD_BYTES)
    piece(shards, 0)
    assert shards.ranged_reads == 1
    shards.ahead([])
    wait_for(lambda: looks[-1] == [])  # or it would be downloaded anew
    path.unlink()
    wait_for(lambda: not len(shards._whole.files))  # an open file would keep its room on the disk
    piece(shards, 0)
    assert shards.ranged_reads == 2
    shards.close()


def test_open_files_are_few(s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "OPEN_SHARDS", 2)
    shards = RemoteShards(upload(s3), ENTRIES, "id", tmp_path, 1 << 30)
    shards.ahead(range(6))
    wait_for(lambda: len(cached(tmp_path)) == 6)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: piece(shards, number % 6, number), range(2000)))
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    assert shards.ranged_reads == 0
    shards.close()


def test_an_open_file_is_its_readers_until_they_let_go(tmp_path: Path) -> None:
    files, paths = OpenFiles(1), [tmp_path / "a", tmp_path / "b"]
    for number, path in enumerate(paths):
        path.write_text(str(number) * 3)
        files.add(number, OpenFile(os.open(path, os.O_RDONLY)))
    assert files.get(0) is None
    last = files.get(1)
    assert last is not None
    other = OpenFile(os.open(paths[1], os.O_RDONLY))
    assert files.add(1, other) is last  # another thread was faster
    files.add(0, OpenFile(os.open(paths[0], os.O_RDONLY)))
    assert last.read(1, 9) == b"11"
    descriptor = last.descriptor
    del last
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    paths[0].unlink()
    files.forget_deleted()
    assert len(files) == 0


def test_missing_wrong_size_and_denied(s3: ObjectStore, tmp_path: Path) -> None:
    url = upload(s3)
    s3.client.delete_object(Bucket="bucket", Key="set/train-000001.tar")
    s3.put("set/train-000002.tar", CONTENTS[2][:-7])
    shards = RemoteShards(url, ENTRIES, "id", tmp_path, 1 << 30)
    with pytest.raises(RemoteError, match=r"s3://bucket/set/train-000001.tar is missing .*1 attempt") as missing:
        shards.read(1, 0, 10)
    with pytest.raises(RemoteError, match=r"train-000002.tar has 99993 bytes, dataset.json says 100000"):
        shards.read(2, 0, 10)
    assert "\n" not in str(missing.value)
    shards.ahead([1, 2, 3])  # what cannot be had does not hold up the rest
    wait_for(lambda: cached(tmp_path) == [3])
    assert shards.retries_made == 0
    shards.close()
    with pytest.raises(RemoteError, match=r"nosuch.* cannot be opened"):
        RemoteShards("nosuch://bucket/set", ENTRIES, "id", tmp_path, 0).read(0, 0, 1)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENTS; `server.plan` says how the next requests fail, `server.gate` holds up chunks of downloads."""

    server: Any
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.requests += 1
            failure = server.plan.pop(0) if server.plan else None
        if failure == "hang up":
            self.close_connection = True
            return
        if failure == "cut short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"only so much")
            self.close_connection = True
            return
        if failure is not None:
            self.send_response(int(failure))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, status = CONTENTS[int(self.path[-10:-4])], 200
        asked = self.headers.get("Range")
        if asked and server.ranges:
            start, stop = asked.removeprefix("bytes=").split("-")
            body, status = body[int(start) : int(stop) + 1], 206
            if len(body) == remote._CHUNK_BYTES:
                server.gate.wait(PATIENCE_SECONDS)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def web_server(plan: list[str] | None = None, ranges: bool = True) -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.lock, server.requests, server.ranges, server.gate = threading.Lock(), 0, ranges, threading.Event()
    server.plan = list(plan or [])
    server.gate.set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/set", server
    server.gate.set()
    server.shutdown()
    server.server_close()


def test_a_store_that_fails_at_first(tmp_path: Path) -> None:
    # fsspec asks with HEAD, then GET for the size: both have to fail for it to tell.
    with web_server(["503", "503", "500", "500"]) as (url, server):
        shards = RemoteShards(url, ENTRIES, "id", tmp_path, 0)
        piece(shards, 0)
        assert shards.retries_made == 2
        server.plan = ["429", "cut short", "503"]
        piece(shards, 0)
        assert shards.retries_made == 2 + 3
        server.plan = ["hang up"] * 3  # some of these aiohttp repeats itself
        piece(shards, 0)
        assert shards.retries_made > 2 + 3
        server.plan = ["503"] * 3
        shards.retries = 2
        before = server.requests
        with pytest.raises(RemoteError, match=r"train-000000.tar cannot be read .*503.*3 attempt"):
            shards.read(0, 0, 10)
        assert server.requests == before + 3


@pytest.mark.parametrize(("status", "text"), [("403", "may not be read"), ("404", "is missing"), ("400", "cannot be")])
def test_what_no_retry_mends(tmp_path: Path, status: str, text: str) -> None:
    with web_server([status] * 9) as (url, server):
        shards = RemoteShards(url, ENTRIES, "id", tmp_path, 0)
        with pytest.raises(RemoteError, match=f"train-000000.tar {text}"):
            shards.read(0, 0, 10)
        assert shards.retries_made == 0
        server.plan = []
        piece(shards, 0)
        server.plan = [status]
        with pytest.raises(RemoteError, match=f"train-000000.tar {text}"):
            shards.read(0, 0, 10)


def test_downloads_are_retried_too(tmp_path: Path) -> None:
    with web_server() as (url, server):
        shards = RemoteShards(url, ENTRIES, "id", tmp_path, 1 << 30)
        piece(shards, 0)
        server.plan = ["503", "cut short"]
        shards.ahead([0])
        wait_for(lambda: cached(tmp_path) == [0])
        assert next(tmp_path.glob("*.tar")).read_bytes() == CONTENTS[0]
        assert shards.retries_made >= 1
        shards.close()


def test_a_server_without_ranges(tmp_path: Path) -> None:
    with web_server(ranges=False) as (url, _):
        shards = RemoteShards(url, ENTRIES, "id", tmp_path, 1 << 30)
        with pytest.raises(RemoteError, match="ignores byte ranges"):
            shards.read(0, 0, 10)


def test_a_download_nobody_needs_is_given_up(tmp_path: Path) -> None:
    """Where it is between two requests: those under way come to their end."""
    with web_server() as (url, server), ThreadPoolExecutor(1) as other:
        server.gate.clear()
        shards = RemoteShards(url, ENTRIES, "id", tmp_path, 1 << 30)
        shards.ahead([0, 1])
        wait_for(lambda: list(tmp_path.glob(".*0.tar.tmp-*")))
        shards.ahead([1])
        server.gate.set()
        wait_for(lambda: cached(tmp_path) == [1])
        server.gate.clear()
        shards.ahead([2])
        wait_for(lambda: list(tmp_path.glob(".*2.tar.tmp-*")))
        closed = other.submit(shards.close)
        wait_for(shards._closed.is_set)
        server.gate.set()
        closed.result(PATIENCE_SECONDS)
        assert shards._thread is not None
        shards._thread.join(PATIENCE_SECONDS)
        assert cached(tmp_path) == [1]
        assert not list(tmp_path.glob(".*.tmp-*"))


def test_the_folder_lock_is_not_inherited(tmp_path: Path) -> None:
    shards = RemoteShards("memory://x", ENTRIES, "id", tmp_path, 1)
    with shards._whole.locked():
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    with open(tmp_path / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
