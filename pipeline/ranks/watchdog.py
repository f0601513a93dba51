"""A run in which nothing moves any more says where and why, and ends.

One rank that hangs holds all others inside a collective, without an error and, on GPUs, for half an hour or for ever.
Each rank's loop ticks; a thread beside it tells the job's store how long ago that was. Where no rank has ticked for the
given time, all ranks write their stacks and leave, and one of them says which rank to look at.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Self

import torch.distributed as dist
from torch.distributed import TCPStore

from pipeline.ranks.log_file import say_at_once

_ANSWER_SECONDS = 5.0  # the store answers within milliseconds, or is taken for gone
_FAREWELL_SECONDS = 5.0  # for a rank to notice by itself that another one has failed
_LAST_SECONDS = 10.0  # for each of the last acts: a file system or a tracking server may be what hangs
_runs = itertools.count()  # of this process: the same on all ranks


@dataclass(frozen=True)
class Beat:
    """What a rank last told: its number of beats so far, the seconds since its loop's last tick, and where that was.

    ticked_at: of that tick, Unix time in seconds; it orders ranks as far as their hosts' clocks agree.
    """

    number: int
    silent_seconds: float
    where: str
    ticked_at: float


@dataclass(frozen=True)
class Sight:
    """What one rank sees of another: its newest beat, and for how many seconds that has been the newest."""

    beat: Beat
    seconds: float


class Watchdog:
    """Watches the loop of `rank` (of `ranks`) inside `with`.

    Ends the process, with code 1, when no rank has ticked for `seconds`: stacks are then in `folder`/rank-00000.txt,
    and `on_stall` was called with the reason, in a thread, for at most 10 s. A rank that waits for one that still ticks
    (it evaluates, or saves) waits on. Time in which the process as a whole was stopped, by a scheduler that suspends
    jobs or by a debugger, does not count.

    A process that does not run Python any more at all writes its stacks on stderr, from a thread in C. That thread
    cannot tell a process that was stopped: one that goes on says that such stacks are of no error.

    Where there are several ranks, MASTER_ADDR and MASTER_PORT have to be in the environment.
    """

    def __init__(
        self, rank: int, ranks: int, seconds: float, folder: Path, on_stall: Callable[[str], None] | None = None
    ) -> None:
        self.rank, self.ranks, self.seconds, self.folder, self.on_stall = rank, ranks, seconds, folder, on_stall
        self.interval = min(5.0, seconds / 10)
        self.lock_seconds = seconds + 20 * self.interval  # without Python's lock: stacks then come from C
        # torchrun keeps its store when it restarts ranks, and a process may hold one run after the other.
        self._run = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"
        self._where, self._ticked = "starting", time.monotonic()
        self._silent_seconds = 0.0
        self._over = threading.Event()
        self._sights: Mapping[int, Sight] = {}  # of the other ranks, while this one is silent
        self._store_answered = time.monotonic()
        self._verdict: str | None = None  # that another rank has come to
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def _key(self, name: int | str) -> str:
        return f"watchdog/{self._run}/{name}"

    def tick(self, where: str) -> None:
        """The loop is now `where`: a few words that go with "is", the same on all ranks ("training, step 9")."""
        self._where = where
        self._ticked = time.monotonic()

    def __enter__(self) -> Self:
        self._ticked = self._store_answered = time.monotonic()
        faulthandler.dump_traceback_later(self.lock_seconds, file=2)
        self._watcher.start()
        if self.ranks > 1:
            # Apart from the watcher: a TCPStore (torch 2.15) whose host is stopped does not even time out.
            threading.Thread(target=self._talk, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._watcher.join(1.0)
        faulthandler.cancel_dump_traceback_later()
        if kind is not None and self.ranks > 1:
            # NCCL tells nobody that a peer is gone: the others would sit in a collective until they are killed.
            _at_most(
                _ANSWER_SECONDS, lambda: _client().set(self._key("failed"), f"rank {self.rank} failed: {kind.__name__}")
            )
            if self.rank == 0 and dist.is_initialized() and dist.get_backend() == "nccl":
                time.sleep(self.interval + _FAREWELL_SECONDS + 1.0)  # it may hold the store that they read this from

    def _watch(self) -> None:
        ticked, checked, stopped_seconds = self._ticked, time.monotonic(), 0.0
        while not self._over.wait(self.interval):
            now = time.monotonic()
            if ticked != self._ticked:
                ticked, stopped_seconds = self._ticked, 0.0
            unchecked_seconds = now - checked
            if unchecked_seconds > 3 * self.interval:
                stopped_seconds += now - max(checked, ticked)
            checked = now
            self._silent_seconds = max(0.0, now - ticked - stopped_seconds)
            reason = self._verdict or (self._stalled() if self._silent_seconds >= self.seconds else None)
            if reason is not None:
                self._end(reason)
            # A thread may hang with Python's lock held, and this one with it.
            faulthandler.dump_traceback_later(self.lock_seconds, file=2)  # waits for stacks that are being written
            if unchecked_seconds > self.lock_seconds:
                say_at_once(
                    f"note: rank {self.rank} goes on after {unchecked_seconds:.0f} s in which it was stopped (a "
                    "suspended job, a debugger) or a thread held Python's lock; stacks just above are of that, and of "
                    "no error"
                )

    def _stalled(self) -> str | None:
        """Why the run stands still, or None where another rank still makes progress."""
        start = f"no progress for {self._silent_seconds:.0f} s: "
        if self.ranks == 1:
            return f"{start}the rank is {self._where}"
        unanswered = time.monotonic() - self._store_answered
        if unanswered > self.seconds / 2 or not self._sights:
            host = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
            return (
                f"{start}{host}, which holds the job's store, has not answered for {unanswered:.0f} s: it is stopped, "
                f"or its host swaps or is gone; rank {self.rank} is {self._where}"
            )
        sights = {**self._sights, self.rank: Sight(self._beat(0), 0.0)}
        reason = blame(sights, self.seconds - 2 * self.interval, self.seconds / 2)
        return reason and start + reason

    def _beat(self, number: int) -> Beat:
        return Beat(number, self._silent_seconds, self._where, time.time() - (time.monotonic() - self._ticked))

    def _talk(self) -> None:
        store: TCPStore | None = None
        number = 0
        changed: dict[int, tuple[Beat, float]] = {}  # the newest beat of each rank, and when it came
        failed: float | None = None  # when another rank was seen to have failed
        while not self._over.is_set():
            try:
                store = store or _client()
                number += 1
                store.set(self._key(self.rank), json.dumps(asdict(self._beat(number))))
                if store.check([self._key("failed")]):
                    failed = failed or time.monotonic()
                    if time.monotonic() - failed >= _FAREWELL_SECONDS:
                        self._follow(store.get(self._key("failed")).decode())
                if self._silent_seconds > self.seconds / 2:  # time enough to see which of the others beat on
                    if store.check([self._key("verdict")]):
                        self._verdict = store.get(self._key("verdict")).decode()
                    for rank, beat in self._read(store).items():
                        if rank not in changed or changed[rank][0].number != beat.number:
                            changed[rank] = beat, time.monotonic()
                    now = time.monotonic()
                    self._sights = {rank: Sight(beat, now - since) for rank, (beat, since) in changed.items()}
                self._store_answered = time.monotonic()
            except Exception:  # torch has several kinds, and what counts is that no answer came
                store = None
            self._over.wait(self.interval)

    def _read(self, store: TCPStore) -> dict[int, Beat]:
        """The newest beats of all other ranks."""
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        begun = [rank for rank in others if store.check([self._key(rank)])]
        beats = dict.fromkeys(others, Beat(0, 0.0, "starting", 0.0))
        if begun:
            texts = store.multi_get([self._key(rank) for rank in begun])
            beats |= {rank: Beat(**json.loads(text)) for rank, text in zip(begun, texts, strict=True)}
        return beats

    def _follow(self, reason: str) -> None:
        """Leave because another rank, which has told why, has left; unless this one is on its way out by itself."""
        if self._over.is_set():
            return
        if self.on_stall is not None:
            on_stall = self.on_stall
            _at_most(_LAST_SECONDS, lambda: on_stall(reason))
        os._exit(1)

    def _end(self, reason: str) -> None:
        """Stacks, one line for all ranks, `on_stall`, and the end of the process. Nothing here may hang."""
        _at_most(_LAST_SECONDS, lambda: self._write_stacks(reason))
        agreed: list[str] = []
        first = threading.Event()
        left = threading.Event()

        def agree() -> None:
            store = _client()
            if store.add(self._key("leaving"), 1) == 1:
                store.set(self._key("verdict"), reason)
                first.set()
            agreed.append(store.get(self._key("verdict")).decode())
            left.set()
            while store.add(self._key("leaving"), 0) < self.ranks:
                time.sleep(0.1)

        thread = threading.Thread(target=agree, daemon=True)
        thread.start()
        left.wait(_ANSWER_SECONDS)
        reason = agreed[0] if agreed else reason
        # Without a store nobody knows who speaks: one rank a host.
        if first.is_set() or (not agreed and os.environ.get("LOCAL_RANK", "0") == "0"):
            say_at_once(f"error: {reason}; stacks are in {self.folder}")
        if self.on_stall is not None:
            on_stall = self.on_stall
            _at_most(_LAST_SECONDS, lambda: on_stall(reason))
        if self.rank == 0:
            thread.join(2 * self.interval + 1.0)  # it may hold the store, where the others still look for the reason
        os._exit(1)

    def _write_stacks(self, reason: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"rank-{self.rank:05}.txt", "a", encoding="utf-8") as file:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"{stamp} rank {self.rank}, process {os.getpid()} on {socket.gethostname()}: {reason}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def blame(sights: Mapping[int, Sight], silent_seconds: float, unheard_seconds: float) -> str | None:
    """Which rank to look at, in words; None while one still makes progress.

    A rank whose beat is older than `unheard_seconds` does not answer; of the others, one that ticked less than
    `silent_seconds` ago makes progress.
    """
    unheard = {rank: sight for rank, sight in sights.items() if sight.seconds > unheard_seconds}
    heard = {rank: sight for rank, sight in sights.items() if rank not in unheard}
    if any(sight.beat.silent_seconds + sight.seconds < silent_seconds for sight in heard.values()):
        return None
    if unheard:
        where = min(unheard.values(), key=lambda sight: sight.beat.number).beat.where
        seconds = max(sight.seconds for sight in unheard.values())
        return (
            f"{_named(list(unheard))} did not answer for more than {seconds:.0f} s: stopped, hanging with Python's "
            f"lock held, or the host swaps or is gone; last {where}"
        )
    groups: dict[str, list[int]] = defaultdict(list)
    # The fewest first, and of as many those that fell silent first: they are what the others wait for.
    for rank in sorted(heard, key=lambda rank: heard[rank].beat.ticked_at):
        groups[heard[rank].beat.where].append(rank)
    if len(groups) == 1:
        return f"all ranks are {next(iter(groups))}"
    smallest_first = sorted(groups.items(), key=lambda item: len(item[1]))
    parts = [f"{_named(ranks)} {'are' if len(ranks) > 1 else 'is'} {where}" for where, ranks in smallest_first]
    return f"{parts[0]}, but {', '.join(parts[1:4])}"


def _named(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, sorted(ranks)[:4]))
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{more}"


def _client() -> TCPStore:
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=_ANSWER_SECONDS),
        wait_for_workers=False,
    )


def _at_most(seconds: float, act: Callable[[], None]) -> None:
    """Run `act` in a thread, and wait for it no longer than that."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
