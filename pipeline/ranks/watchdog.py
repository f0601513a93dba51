"""A run in which nothing moves any more says where and why, and ends.

One rank that hangs holds all others inside a collective, without an error and, on GPUs, for half an hour or for ever.
Each rank's loop ticks; a thread beside it tells the job's store how long ago that was. Where no rank has ticked for the
given time, all ranks write their stacks and leave, and one of them says which rank to look at.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch.distributed as dist
from torch.distributed import TCPStore

from pipeline.ranks.board import ANSWER_SECONDS, Board, Obituary, at_most, client
from pipeline.ranks.collectives import gather
from pipeline.ranks.lifetime import EXIT_REQUEUE, StopRequest, Terminated
from pipeline.ranks.log_file import say_at_once
from pipeline.ranks.peers import Beat, LostPeerError, Sight, blame, named
from pipeline.ranks.sentinel import Sentinel

_FAREWELL_SECONDS = 5.0  # for a rank to notice by itself that another one has failed
_START_SECONDS = 300.0  # models are built, kernels tried, checkpoints read
_LAST_SECONDS = 10.0  # for each of the last acts: a file system or a tracking server may be what hangs


class Watchdog:
    """Watches the loop of `rank` (of `ranks`) inside `with`.

    Ends the process, with code 1, when no rank has ticked for `seconds`: stacks are then in `folder`/rank-00000.txt,
    and `on_stall` was called with the reason, in a thread, for at most 10 s. A rank that waits for one that still ticks
    (it evaluates, or saves) waits on. Time in which the process as a whole was stopped, by a scheduler that suspends
    jobs or by a debugger, does not count.

    With `stop` the run is starting until `begin`: no tick is then missed before five minutes are over, and all ranks
    leave, with EXIT_REQUEUE, where one of them is asked to stop.

    A process that does not run Python any more at all writes its stacks on stderr: see sentinel.py.

    Where there are several ranks, MASTER_ADDR and MASTER_PORT have to be in the environment.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        seconds: float,
        folder: Path,
        on_stall: Callable[[str], None] | None = None,
        hosts: Sequence[str] = (),
        stop: StopRequest | None = None,
    ) -> None:
        """`hosts`: of each rank, by name."""
        self.rank, self.ranks, self.folder, self.on_stall, self.hosts = rank, ranks, folder, on_stall, hosts
        self.stop = stop
        self._starting = stop is not None
        self._seconds = seconds
        self.interval = min(5.0, seconds / 10)
        self._board = Board(rank, ranks)
        self._where, self._ticked = "starting", time.monotonic()
        self._silent_seconds = 0.0
        self._over = threading.Event()
        self._sights: Mapping[int, Sight] = {}  # of the other ranks, while this one is silent
        self._store_answered = time.monotonic()
        self._verdict: str | None = None  # that another rank has come to
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def seconds(self) -> float:
        """Without progress."""
        return max(self._seconds, _START_SECONDS) if self._starting else self._seconds

    @property
    def lock_seconds(self) -> float:
        """Without Python's lock: stacks are then written from outside."""
        return self.seconds + 20 * self.interval

    def begin(self) -> None:
        """The start is over, on all ranks together: from now on a request to stop is answered by a checkpoint.

        Raises Terminated, on all ranks, where one of them was asked before.
        """
        assert self.stop is not None
        # In this order: what the watching thread has told the others because the run was starting is then among the
        # reasons, and nobody is left behind in this collective.
        self._starting = False
        self.tick("starting")
        if self.stop.requested if self.ranks == 1 else any(gather(self.stop.reason)):
            raise Terminated
        self.stop.arm()

    def tick(self, where: str) -> None:
        """The loop is now `where`: a few words that go with "is", the same on all ranks ("training, step 9")."""
        self._where = where
        self._ticked = time.monotonic()

    @contextmanager
    def busy(self, where: str) -> Iterator[None]:
        """`where` for as long as it takes: something of unknown length that shows its own progress."""
        over = threading.Event()

        def tick() -> None:
            while not over.is_set():
                self.tick(where)
                over.wait(self.interval)

        thread = threading.Thread(target=tick, name="busy", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def __enter__(self) -> Self:
        self._ticked = self._store_answered = time.monotonic()
        self._sentinel = Sentinel(self.rank, self.interval)
        self._sentinel.tell(self.lock_seconds)
        self._watcher.start()
        if self.ranks > 1:
            # Apart from the watcher: a TCPStore (torch 2.15) whose host is stopped does not even time out.
            threading.Thread(target=self._talk, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._over.is_set():
            return
        self._over.set()
        self._watcher.join(1.0)
        self._sentinel.close()
        if kind not in (None, LostPeerError, Terminated) and self.ranks > 1:
            # NCCL tells nobody that a peer is gone: the others would sit in a collective until they are killed.
            at_most(
                ANSWER_SECONDS,
                lambda: client().set(
                    self._board.key("failed"), f"{named([self.rank], self.hosts)} failed: {kind.__name__}"
                ),
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
            self._sentinel.tell(self.lock_seconds)
            if unchecked_seconds > self.lock_seconds:
                say_at_once(
                    f"note: rank {self.rank} goes on after {unchecked_seconds:.0f} s in which it was stopped (a "
                    "suspended job, a debugger) or a thread held Python's lock; that is no error"
                )

    def _stalled(self) -> str | None:
        """Why the run stands still, or None where another rank still makes progress."""
        start = f"no progress for {self._silent_seconds:.0f} s: "
        if self.ranks == 1:
            return f"{start}the rank is {self._where}"
        unanswered = time.monotonic() - self._store_answered
        if unanswered > self.seconds / 2 or not self._sights:
            return (
                f"{start}{self._holder}, which holds the job's store, has not answered for {unanswered:.0f} s: it is "
                f"stopped, or its host swaps or is gone; rank {self.rank} is {self._where}"
            )
        sights = {**self._sights, self.rank: Sight(self._beat(0), 0.0)}
        reason = blame(sights, self.seconds - 2 * self.interval, self.seconds / 2, self.hosts)
        return reason and start + reason

    @property
    def _holder(self) -> str:
        """Of the job's store."""
        host = f" on {self.hosts[0]}" if self.hosts else ""
        return f"the launcher{host}" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else f"rank 0{host}"

    def _beat(self, number: int) -> Beat:
        return Beat(number, self._silent_seconds, self._where, time.time() - (time.monotonic() - self._ticked))

    def _talk(self) -> None:
        store: TCPStore | None = None
        number = 0
        changed: dict[int, tuple[Beat, float]] = {}  # the newest beat of each rank, and when it came
        failed: float | None = None  # when another rank was seen to have failed
        while not self._over.is_set():
            try:
                store = store or client()
                number += 1
                store.set(self._board.key(self.rank), json.dumps(asdict(self._beat(number))))
                if self.stop is not None and not self.stop.closing and not self.stop.armed:
                    self._leave_start_if_asked(store)
                if store.check([self._board.key("failed")]):
                    failed = failed or time.monotonic()
                    if time.monotonic() - failed >= _FAREWELL_SECONDS:
                        self._follow(store.get(self._board.key("failed")).decode())
                if self._silent_seconds > self.seconds / 2:  # time enough to see which of the others beat on
                    if store.check([self._board.key("verdict")]):
                        self._verdict = store.get(self._board.key("verdict")).decode()
                    for rank, beat in self._board.beats(store).items():
                        if rank not in changed or changed[rank][0].number != beat.number:
                            changed[rank] = beat, time.monotonic()
                    now = time.monotonic()
                    self._sights = {rank: Sight(beat, now - since) for rank, (beat, since) in changed.items()}
                self._store_answered = time.monotonic()
            except Exception:  # torch has several kinds, and what counts is that no answer came
                store = None
            self._over.wait(self.interval)

    def _leave_start_if_asked(self, store: TCPStore) -> None:
        """All ranks together: each sees what one of them has told, also one that waits in `begin`."""
        assert self.stop is not None
        if self._starting and self.stop.requested:
            store.set(self._board.key("stop"), self.stop.reason)
        if store.check([self._board.key("stop")]):
            self._leave_start()

    def _leave_start(self) -> None:
        if self.rank == 0:
            time.sleep(self.interval + 1.0)  # it may hold the store that the others read this from
        os._exit(EXIT_REQUEUE)

    def mourn(self, error: BaseException) -> None:
        """Another rank is gone, as `error` of a collective tells: say which, one rank for all. Raises LostPeerError.

        Returns where all ranks are there and none has failed: then `error` is of this rank alone (NCCL's for a full
        /dev/shm, or two ranks on one GPU, reads like that of a lost peer).
        """
        found = Obituary()
        patience = max(_FAREWELL_SECONDS, 2 * self.interval + 1.0)
        starting = self.stop is not None and not self.stop.armed
        on_stop = self._leave_start if starting else None
        at_most(
            2 * ANSWER_SECONDS + 2 * self.interval + _LAST_SECONDS,
            lambda: self._board.inquire(error, found, patience, _LAST_SECONDS, self.hosts, on_stop),
        )
        if found.nobody:
            return
        speaks = not found.said_by_another
        if found.reason is None:
            found.reason = f"{self._holder}, which holds the job's store, is gone: killed, or the host is lost"
            speaks = speaks and os.environ.get("LOCAL_RANK", "0") == "0"  # nobody knows who speaks: one rank a host
        if speaks:
            text = " ".join(str(error).split())
            say_at_once(f"error: {found.reason} (rank {self.rank}, {self._where}: {text[:200]})")
        self._tell_on_stall(found.reason)
        raise LostPeerError(found.reason) from error

    def _tell_on_stall(self, reason: str) -> None:
        if self.on_stall is not None:
            on_stall = self.on_stall
            at_most(_LAST_SECONDS, lambda: on_stall(reason))

    def _follow(self, reason: str) -> None:
        """Leave because another rank, which has told why, has left; unless this one is on its way out by itself."""
        if self._over.is_set():
            return
        self._tell_on_stall(reason)
        os._exit(1)

    def _end(self, reason: str) -> None:
        """Stacks, one line for all ranks, `on_stall`, and the end of the process. Nothing here may hang."""
        at_most(_LAST_SECONDS, lambda: self._write_stacks(reason))
        agreed: list[tuple[str, bool]] = []  # the reason of all, and whether it is of this rank
        left = threading.Event()

        def agree() -> None:
            store = client()
            agreed.append(self._board.agree(store, reason))
            left.set()
            self._board.wait_for_leaving(store)

        thread = threading.Thread(target=agree, daemon=True)
        thread.start()
        left.wait(ANSWER_SECONDS)
        # Without a store nobody knows who speaks: one rank a host.
        verdict, speaks = agreed[0] if agreed else (reason, os.environ.get("LOCAL_RANK", "0") == "0")
        if speaks:
            say_at_once(f"error: {verdict}; stacks are in {self.folder}")
        self._tell_on_stall(verdict)
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
