"""What ranks tell each other through the job's store, beside all collectives: beats, failures, verdicts."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore

from pipeline.ranks.peers import Beat, named

ANSWER_SECONDS = 5.0  # the store answers within milliseconds, or is taken for gone
_runs = itertools.count()  # of this process: the same on all ranks


@dataclass
class Obituary:
    """What is known so far of a rank that seems gone; what is found later than a caller waits for is not missed."""

    reason: str | None = None
    said_by_another: bool = False
    nobody: bool = False  # all are there: the error is of this rank alone


class Board:
    """For `rank`, of `ranks`. MASTER_ADDR and MASTER_PORT, in the environment, say where the store is."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        # torchrun keeps its store when it restarts ranks, and a process may hold one run after the other.
        self._run = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"

    def key(self, name: int | str) -> str:
        return f"watchdog/{self._run}/{name}"

    def beats(self, store: TCPStore) -> dict[int, Beat]:
        """The newest of all other ranks."""
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        begun = [rank for rank in others if store.check([self.key(rank)])]
        beats = dict.fromkeys(others, Beat(0, 0.0, "starting", 0.0))
        if begun:
            texts = store.multi_get([self.key(rank) for rank in begun])
            beats |= {rank: Beat(**json.loads(text)) for rank, text in zip(begun, texts, strict=True)}
        return beats

    def agree(self, store: TCPStore, reason: str) -> tuple[str, bool]:
        """The verdict of the rank that came to one first, and whether it was this one."""
        first = store.add(self.key("leaving"), 1) == 1
        if first:
            store.set(self.key("verdict"), reason)
        return store.get(self.key("verdict")).decode(), first

    def wait_for_leaving(self, store: TCPStore) -> None:
        while store.add(self.key("leaving"), 0) < self.ranks:
            time.sleep(0.1)

    def inquire(
        self,
        error: BaseException,
        found: Obituary,
        patience_seconds: float,
        linger_seconds: float,
        hosts: Sequence[str],
        on_stop: Callable[[], None] | None,
    ) -> None:
        """Fill in `found` after `error` of a collective: who does not beat on within the patience, or has told why.

        Calls `on_stop` where the ranks were asked to stop. Rank 0, whose process may hold the store, waits up to
        `linger_seconds` for the others to have read it: they would take this rank for the lost one.
        """
        store = client()
        until = time.monotonic() + patience_seconds
        before = self.beats(store)
        told = None
        while time.monotonic() < until and told is None:  # a rank that fails by itself tells so
            time.sleep(0.2)
            for name in ("stop", "failed"):
                if store.check([self.key(name)]):
                    told = name
        if told == "stop" and on_stop is not None:
            on_stop()
        gone: list[int] = []
        if told == "failed":
            found.reason = f"{store.get(self.key('failed')).decode()}, see its message"
        else:
            now = self.beats(store)
            gone = [rank for rank in now if now[rank].number == before[rank].number]
            if gone:
                are = "are" if len(gone) > 1 else "is"
                found.reason = f"{named(gone, hosts)} {are} gone: killed, or the host is lost"
            elif "gloo" in str(error):
                found.reason = (
                    f"{named([self.rank], hosts)} has lost its connection to another, and all are there: the network "
                    "between hosts"
                )
            else:
                found.nobody = True
                return
        found.said_by_another = store.add(self.key("mourning"), 1) > 1
        if self.rank == 0 and gone:
            until = time.monotonic() + linger_seconds
            while time.monotonic() < until and store.add(self.key("mourning"), 0) < self.ranks - len(gone):
                time.sleep(0.2)


def client() -> TCPStore:
    """Raises torch's errors where the store does not answer."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=ANSWER_SECONDS),
        wait_for_workers=False,
    )


def at_most(seconds: float, act: Callable[[], object]) -> None:
    """Run `act` in a thread, and wait for it no longer than that."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
