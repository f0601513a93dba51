"""Ranks and their hosts in words, and what a collective says when another rank is gone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SHOWN_RANKS, _SHOWN_HOSTS = 4, 4
# gloo's (torch 2.15), seen; NCCL's, from its documentation.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Connection timed out",
    "connectFullMesh",
    "No route to host",
    "Network is unreachable",
    "Host is unreachable",
    "Broken pipe",
    "Read error",
    "Write error",
    "Socket closed",
    "Timed out waiting",
    "NCCL",
    "ncclRemoteError",
    "ncclSystemError",
    "remote process exited",
)


class LostPeerError(RuntimeError):
    """Another rank has failed or is gone, which has been said."""


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


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective has failed because another rank is gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(mark in text for mark in _LOST_PEER)


def named(ranks: Sequence[int], hosts: Sequence[str] = ()) -> str:
    """ "rank 3 on node2", "ranks 0, 1, 2, 3 and 4 more on node1, node2". hosts: by rank, of all of them."""
    listed = ", ".join(map(str, sorted(ranks)[:_SHOWN_RANKS]))
    more = f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else ""
    places = list(dict.fromkeys(hosts[rank] for rank in sorted(ranks) if rank < len(hosts) and hosts[rank]))
    where = f" on {', '.join(places[:_SHOWN_HOSTS])}" if places else ""
    where += f" and {len(places) - _SHOWN_HOSTS} more hosts" if len(places) > _SHOWN_HOSTS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{more}{where}"


def blame(
    sights: Mapping[int, Sight], silent_seconds: float, unheard_seconds: float, hosts: Sequence[str] = ()
) -> str | None:
    """Which rank to look at, in words; None while one still makes progress.

    A rank whose beat is older than `unheard_seconds` does not answer; of the others, one that ticked less than
    `silent_seconds` ago makes progress.
    """
    unheard = {rank: sight for rank, sight in sights.items() if sight.seconds > unheard_seconds}
    heard = {rank: sight for rank, sight in sights.items() if rank not in unheard}
    if any(sight.beat.silent_seconds + sight.seconds < silent_seconds for sight in heard.values()):
        return None
    if unheard:
        last = min(unheard.values(), key=lambda sight: sight.beat.number).beat
        seconds = max(sight.seconds for sight in unheard.values())
        # A beat tells of the time when it was sent: by then the loop may have been there for long.
        return (
            f"{named(list(unheard), hosts)} did not answer for more than {seconds:.0f} s: stopped, hanging with "
            f"Python's lock held, or the host swaps or is gone; last heard {last.where} "
            f"({last.silent_seconds:.0f} s into it)"
        )
    groups: dict[str, list[int]] = defaultdict(list)
    # The fewest first, and of as many those that fell silent first: they are what the others wait for.
    for rank in sorted(heard, key=lambda rank: heard[rank].beat.ticked_at):
        groups[heard[rank].beat.where].append(rank)
    if len(groups) == 1:
        return f"all ranks are {next(iter(groups))}"
    smallest_first = sorted(groups.items(), key=lambda item: len(item[1]))
    parts = [f"{named(ranks, hosts)} {'are' if len(ranks) > 1 else 'is'} {where}" for where, ranks in smallest_first]
    return f"{parts[0]}, but {', '.join(parts[1:4])}"
