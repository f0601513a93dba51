"""Signals: what a rank and its data workers do when asked to stop, and when the launcher dies. In real processes."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import pytest

from pipeline.data import loader
from pipeline.data.loader import training_batches
from pipeline.ranks.collectives import Ranks
from tests.support.datasets import Datasets
from tests.support.loading import configured
from tests.support.processes import PATIENCE_SECONDS, Workers, is_over, wait_for
from tests.support.runs import ROOT

# A rank whose clock is the test's: it tells "heard" once a signal was listened to and has not ended it, and obeys lines
# on stdin: "clock SECONDS", "save", "leave".
LOOP = """
import ctypes, sys, threading, time
from types import SimpleNamespace
from pipeline.ranks import lifetime
from pipeline.ranks.lifetime import StopRequest, Terminated, ignore_sigterm, leave_with_launcher

class Heard(StopRequest):
    def _ask_by(self, number):
        super()._ask_by(number)
        if threading.current_thread() is not threading.main_thread():
            print("heard", flush=True)

def obey():
    for line in sys.stdin:
        order, *value = line.split()
        if order == "clock":
            clock.monotonic = lambda seconds=float(value[0]): seconds
            print("set", flush=True)
        else:
            orders[order].set()

orders = {"save": threading.Event(), "leave": threading.Event()}
lifetime.time = clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=time.sleep)
lifetime._ALONE_SECONDS = 1.0 if "deaf" in sys.argv else 3600.0
request = Heard()
leave_with_launcher(request)
if "armed" in sys.argv: request.arm()
if "closing" in sys.argv: ignore_sigterm()
threading.Thread(target=obey, daemon=True).start()
print("ready", flush=True)
try:
    if "in C" in sys.argv:
        mutex = ctypes.create_string_buffer(64)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
    while "deaf" in sys.argv or not request.requested:
        time.sleep(0.05)
    if "saves" in sys.argv:
        orders["save"].wait()
        request.disarm()
        print("saved", flush=True)
        orders["leave"].wait()
    sys.exit(f"requested by {request.reason}")
except Terminated:
    sys.exit("Terminated")
"""


class Rank:
    """A process that runs LOOP and has come to its line "ready"."""

    started: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP, *arguments],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "LOCAL_RANK"} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(self.process)
        self.wait_for("ready")

    def wait_for(self, line: str) -> None:
        assert self.process.stdout
        assert self.process.stdout.readline() == line + "\n"

    def order(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def clock(self, seconds: float) -> None:
        """How long after its first signal, for this rank, the next ones come."""
        self.order(f"clock {seconds}")
        self.wait_for("set")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def send_and_wait(self, number: int) -> None:
        """A signal that does not end the rank."""
        self.send(number)
        self.wait_for("heard")

    def end(self) -> tuple[int, list[str]]:
        """(exit code, lines of stderr)."""
        _, errors = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, errors.splitlines()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A rank that a failed test has left would wait on."""
    yield
    while Rank.started:
        process = Rank.started.pop()
        process.kill()
        process.wait()


def asked(name: str) -> str:
    return f"{name}: a checkpoint follows at the next step; once more ends this rank at once"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_asks_for_a_stop_where_there_is_something_to_save(name: str) -> None:
    unarmed, armed = Rank(), Rank("armed")
    for rank in (unarmed, armed):
        rank.send(signal.Signals[name])
    assert unarmed.end() == (1, ["Terminated"])
    assert armed.end() == (1, [asked(name), f"requested by {name}"])


def test_nobody_has_to_read_what_is_said() -> None:
    """`2>&1 | tee` dies of the same signal: the request is answered all the same, and a second one ends the rank."""
    asked, hangs = Rank("armed"), Rank("armed", "in C")
    for rank in (asked, hangs):
        assert rank.process.stderr
        rank.process.stderr.close()
    asked.send(signal.SIGUSR1)
    assert asked.process.wait(PATIENCE_SECONDS) == 1  # by its own last line, which is Python's
    hangs.send_and_wait(signal.SIGUSR1)
    hangs.clock(3.1)
    hangs.send(signal.SIGTERM)
    assert hangs.process.wait(PATIENCE_SECONDS) == 143


def test_a_second_signal_ends_a_rank_at_once_wherever_it_is() -> None:
    """What comes within 3 s is the same signal, passed on; and a rank that saves for longer is not cut off closing."""
    hangs, closes, starts, saves = Rank("armed", "in C"), Rank("closing", "deaf"), Rank("in C"), Rank("armed", "saves")
    for rank in (hangs, closes, starts, saves):
        rank.send_and_wait(signal.SIGUSR1)
        rank.clock(2.9)
        rank.send_and_wait(signal.SIGTERM)
        rank.clock(3.1)
    saves.order("save")
    saves.wait_for("saved")
    saves.send_and_wait(signal.SIGTERM)
    for rank in (hangs, closes, starts):
        rank.send(signal.SIGTERM)
    at_once = "SIGTERM once more: this rank ends at once"
    assert hangs.end() == (143, [asked("SIGUSR1"), at_once])
    assert closes.end() == (143, [at_once])
    assert starts.end() == (143, [at_once])
    saves.order("leave")
    assert saves.end() == (1, [asked("SIGUSR1"), "requested by SIGUSR1"])


def test_the_end_of_the_launcher_asks_for_a_stop_and_waits_for_it() -> None:
    with subprocess.Popen(["sleep", str(PATIENCE_SECONDS)]) as launcher:
        environment = {"LOCAL_RANK": "0", "PIPELINE_LAUNCHER": f"{socket.gethostname()}:{launcher.pid}"}
        unarmed, armed = Rank(**environment), Rank("armed", **environment)
        deaf, alone = Rank("armed", "deaf", **environment), Rank("armed")
        launcher.kill()
    gone, leaves = "the launcher is gone", "error: the launcher is gone; this rank leaves"
    asked_for = f"{gone}: a checkpoint follows at the next step; this rank leaves within"
    assert unarmed.end() == (1, [leaves])
    assert armed.end() == (1, [f"{asked_for} 3600 s", f"requested by {gone}"])
    assert deaf.end() == (1, [f"{asked_for} 1 s", leaves])
    assert alone.process.poll() is None
    alone.send(signal.SIGKILL)
    alone.end()


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_data_worker_outlives_a_signal_to_all(
    datasets: Datasets, data_workers: Workers, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Only its own rank ends it at once: a launcher's SIGTERM, Slurm's SIGUSR1 and Ctrl-C are the rank's to answer."""
    monkeypatch.setattr(loader, "_OUTLIVE_SECONDS", PATIENCE_SECONDS)
    config, manifest, order = configured(datasets, f"augment.where={where}", "data.workers_per_rank=1")
    batches = training_batches(config, manifest, order, Ranks(), 0, 8)
    next(batches)
    (worker,) = data_workers()
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}"], check=True)
    assert len(list(batches)) == 31
    wait_for(lambda: not data_workers())


def test_a_data_worker_ends_by_itself_or_by_its_rank(
    datasets: Datasets, data_workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, manifest, order = configured(datasets, "augment.where=device", "data.workers_per_rank=1")
    for seconds in (600.0, 0.2):
        monkeypatch.setattr(loader, "_OUTLIVE_SECONDS", seconds)
        batches = training_batches(config, manifest, order, Ranks(), 0, 60)
        next(batches)
        (worker,) = data_workers()
        if seconds == 600.0:
            worker.terminate()  # by this process, which is its parent
        else:
            subprocess.run(["sh", "-c", f"kill -TERM {worker.pid}"], check=True)
        wait_for(partial(is_over, worker))
        del batches
        wait_for(lambda: not data_workers())
