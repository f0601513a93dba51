"""Ranks that hang, in real processes with a real store: who is blamed, what is left behind, and what is no stall."""

import ctypes
import math
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from pipeline.ranks.peers import Beat, Sight, blame, is_lost_peer
from pipeline.ranks.watchdog import Watchdog
from tests.support.processes import PATIENCE_SECONDS, wait_for

SECONDS = 4.0  # half of it unheard is what counts: a busy machine keeps no process waiting for so long
LOCK_SECONDS = 3 * SECONDS  # after which stacks come from C
# One process imports torch, and the ranks are forked from it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pipeline.ranks.watchdog", __name__])


def run_rank(rank: int, ranks: int, port: int, folder: Path, habit: str) -> None:
    """Steps, each with a collective at its end; `habit` is this rank's. Rank 0 holds the store, as under deepspeed."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(folder / f"{rank}.err", "w") as errors:
        os.dup2(errors.fileno(), 2)
    store = TCPStore("127.0.0.1", port, None, rank == 0, timedelta(seconds=PATIENCE_SECONDS), wait_for_workers=False)
    told = folder / f"{rank}.told"
    seconds = 10 * SECONDS if "fail" in habit else SECONDS
    if "recurses" in habit:
        threading.Thread(target=recurse, daemon=True).start()
    with Watchdog(rank, ranks, seconds, folder / "stacks", lambda reason: (told.write_text(reason), None)[1]) as dog:
        for step in range(100_000):
            dog.tick("waiting for data")
            if step == 2:
                (folder / f"{rank}.ready").touch()
                if habit == "hangs":
                    wait_for_a_batch()
                if habit == "fails":
                    raise ValueError("a label out of range")
                if habit == "has no room for NCCL, which would fail":
                    raise_as_alone(dog)
                if habit == "holds Python's lock, a slow one":
                    hold_the_lock()
                if habit == "is busy, and slow":
                    with dog.busy("indexing"):
                        time.sleep(SECONDS * 2)
                if habit.startswith("is slow"):
                    for _ in range(40):
                        dog.tick("evaluating")
                        time.sleep(SECONDS * 2 / 40)
            if step == 4 and "slow" in habit:
                break
            time.sleep(0.05)
            dog.tick("training")
            collective(store, step, ranks)
    (folder / f"{rank}.over").touch()
    if rank == 0:  # the store's holder leaves last
        wait_for(lambda: len(list(folder.glob("*.over"))) == ranks)


def raise_as_alone(dog: Watchdog) -> None:
    """As run.main does."""
    error = RuntimeError("NCCL error: ncclSystemError: failed to extend /dev/shm/nccl-1: No space left on device")
    assert is_lost_peer(error)
    dog.mourn(error)
    raise error


def wait_for_a_batch() -> None:
    time.sleep(1000)


def recurse() -> None:
    """So deep that CPython 3.11 takes memory for frames, and gives it back, all the time."""

    def down(levels: int) -> None:
        if levels:
            down(levels - 1)

    while True:
        down(600)


def hold_the_lock() -> None:
    libc, end = ctypes.PyDLL(None), time.monotonic() + 1.5 * LOCK_SECONDS
    while (left := end - time.monotonic()) > 0:
        libc.sleep(math.ceil(left))  # ends early at a signal


def collective(store: TCPStore, step: int, ranks: int) -> None:
    key = f"step {step}"
    store.add(key, 1)
    while store.add(key, 0) < ranks:
        time.sleep(0.01)


def test_a_rank_that_fails_takes_the_others_along(tmp_path: Path) -> None:
    """They sit in a collective that tells nothing, as NCCL's: they leave, and say why, long before that is a stall."""
    ranks = start(tmp_path, "meets a failure", "fails")
    assert codes(*ranks) == [1, 1]
    assert (tmp_path / "0.told").read_text() == "rank 1 failed: ValueError"
    assert "no progress" not in (tmp_path / "0.err").read_text()


def test_an_error_of_nccl_where_all_ranks_are_there_is_this_ranks_own(tmp_path: Path) -> None:
    """It reads as if another were gone."""
    ranks = start(tmp_path, "meets a failure", "has no room for NCCL, which would fail")
    assert codes(*ranks) == [1, 1]
    assert (tmp_path / "0.told").read_text() == "rank 1 failed: RuntimeError"
    said = (tmp_path / "1.err").read_text()
    assert "No space left on device" in said
    assert "gone" not in said


def test_what_takes_unknown_time_is_no_stall(tmp_path: Path) -> None:
    assert codes(*start(tmp_path, "waits for a slow one", "is busy, and slow")) == [0, 0]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Stopped processes do not end by themselves, nor by SIGTERM."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def start(folder: Path, *habits: str) -> list[BaseProcess]:
    """Ranks that have come to their third step."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        CONTEXT.Process(target=run_rank, args=(rank, len(habits), port, folder, habit), daemon=True)
        for rank, habit in enumerate(habits)
    ]
    for process in ranks:
        process.start()
    wait_for(lambda: len(list(folder.glob("*.ready"))) == len(ranks), told=lambda: errors(folder))
    return ranks


def send(process: BaseProcess, number: int) -> None:
    assert process.pid
    os.kill(process.pid, number)


def codes(*ranks: BaseProcess) -> list[int | None]:
    for process in ranks:
        process.join(PATIENCE_SECONDS)
    return [process.exitcode for process in ranks]


def errors(folder: Path, files: str = "*.err") -> list[str]:
    """The lines that ranks, all if nothing is said, wrote on stderr; torch's warnings of a store that is gone aside."""
    lines = [line for path in sorted(folder.glob(files)) for line in path.read_text().splitlines()]
    return [line for line in lines if "[c10d]" not in line]


def test_a_stopped_rank_is_named_by_the_others(tmp_path: Path) -> None:
    ranks = start(tmp_path, "", "", "")
    send(ranks[1], signal.SIGSTOP)
    assert codes(ranks[0], ranks[2]) == [1, 1]
    (line,) = errors(tmp_path)
    assert re.match(r"error: no progress for \d+ s: rank 1 did not answer for more than \d+ s: stopped, ", line)
    assert re.search(r"; last heard (waiting for data|training) \(\d+ s into it\); ", line)
    assert line.endswith(f"; stacks are in {tmp_path}/stacks")
    for rank in (0, 2):
        stacks = (tmp_path / "stacks" / f"rank-{rank:05}.txt").read_text()
        assert "in collective" in stacks
        assert (tmp_path / f"{rank}.told").read_text() in line
    assert sorted(path.name for path in (tmp_path / "stacks").iterdir()) == ["rank-00000.txt", "rank-00002.txt"]
    assert ranks[1].is_alive()


def test_a_rank_that_hangs_in_python_shows_where(tmp_path: Path) -> None:
    assert codes(*start(tmp_path, "", "hangs")) == [1, 1]
    (line,) = errors(tmp_path)
    assert "rank 1 is waiting for data, but rank 0 is training; stacks are in" in line
    assert "in wait_for_a_batch" in (tmp_path / "stacks" / "rank-00001.txt").read_text()


def test_the_holder_of_the_store_stops_and_a_whole_job_goes_on_when_resumed(tmp_path: Path) -> None:
    halved = start(tmp_path / "halved", "", "")
    # Who walks the frames of a thread that runs, as faulthandler's timer does after such a stop, ends in a segfault.
    resumed = start(tmp_path / "resumed", "is slow, and recurses", "waits for the slow one, and recurses")
    send(halved[0], signal.SIGSTOP)
    for process in resumed:
        send(process, signal.SIGSTOP)
    stopped_at = time.monotonic()
    assert codes(halved[1]) == [1]
    (line,) = errors(tmp_path / "halved")
    assert "rank 0, which holds the job's store, has not answered for " in line
    assert line.endswith(f"; rank 1 is training; stacks are in {tmp_path}/halved/stacks")
    time.sleep(max(0.0, stopped_at + LOCK_SECONDS + SECONDS - time.monotonic()))  # or longer: it counts from there on
    for process in resumed:
        send(process, signal.SIGCONT)
    assert codes(*resumed) == [0, 0]  # and rank 1 has waited for rank 0, which ticked, for twice SECONDS
    for rank in (0, 1):
        (line,) = errors(tmp_path / "resumed", f"{rank}.err")
        assert line.startswith(f"note: rank {rank} goes on after ")
    assert not (tmp_path / "resumed" / "stacks").exists()


def test_a_rank_that_holds_the_lock_of_python_shows_where_and_may_go_on(tmp_path: Path) -> None:
    assert codes(*start(tmp_path, "holds Python's lock, a slow one")) == [0]
    lines = errors(tmp_path)
    assert lines[0].startswith(f"note: rank 0 has run no Python for {LOCK_SECONDS:.0f} s: a thread holds Python's lock")
    assert any("in hold_the_lock" in line for line in lines)
    assert re.match(r"note: rank 0 goes on after \d+ s in which it was stopped ", lines[-1])


def test_one_rank_alone(tmp_path: Path) -> None:
    assert codes(*start(tmp_path, "hangs")) == [1]
    (line,) = errors(tmp_path)
    assert re.match(r"error: no progress for \d+ s: the rank is waiting for data; stacks are in ", line)
    assert line.endswith(f"{tmp_path}/stacks")


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        ({0: (9, "a", 1), 1: (9, "a", 1)}, "all ranks are a"),
        ({0: (9, "a", 1), 1: (3, "b", 1), 2: (9, "a", 1)}, None),
        ({0: (9, "a", 1), 1: (0, "b", 8), 2: (9, "a", 1)}, "rank 1 did not answer for more than 8 s"),
        ({0: (9, "a", 1), 1: (9, "b", 1), 2: (9, "a", 1)}, "rank 1 is b, but ranks 0, 2 are a"),
        ({0: (9, "a", 1), 1: (99, "b", 1)}, "rank 1 is b, but rank 0 is a"),
        ({r: (9, "ab"[r == 6], 1) for r in range(9)}, "rank 6 is b, but ranks 0, 1, 2, 3 and 4 more are a"),
    ],
)
def test_who_is_to_blame(beats: dict[int, tuple[float, str, float]], expected: str | None) -> None:
    sights = {rank: Sight(Beat(7, silent, where, -silent), seconds) for rank, (silent, where, seconds) in beats.items()}
    reason = blame(sights, silent_seconds=8.0, unheard_seconds=5.0)
    assert reason == expected or (expected and "answer" in expected and (reason or "").startswith(expected))
