"""The ranks of an evaluation: processes of this host that it starts itself, or those that a launcher has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from pipeline.ranks.collectives import Ranks, local_ranks, own_threads
from pipeline.ranks.lifetime import StopRequest, leave_with_launcher
from pipeline.ranks.ports import any_free_port
from pipeline.ranks.rendezvous import RendezvousError, meet

_LEAVE_SECONDS = 10.0
_SECONDS_A_LINE = (0.1, 15.0)  # of progress, in a terminal; in a file of a job


def progress(total: int, ranks: Ranks) -> tqdm[Any]:
    """A bar over this rank's `total` images, which rank 0 shows."""
    seconds = _SECONDS_A_LINE[not sys.stderr.isatty()]
    return tqdm(total=total, unit="image", desc="evaluate", disable=ranks.rank > 0, mininterval=seconds)


def start_here(arguments: Sequence[str], count: int) -> int:
    """`python -m pipeline ARGUMENTS` as each of `count` ranks; returns the exit code of the first that failed, or 0.

    Where one fails the others are ended. Raises RendezvousError for more ranks than GPUs, and for one that was killed.
    """
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise RendezvousError(
            f"--ranks {count}: this host has {torch.cuda.device_count()} GPUs, one a rank: give fewer"
        )
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(any_free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    try:
        while None in (ended := [rank.poll() for rank in ranks]) and not any(ended):  # all, each time
            time.sleep(0.1)
        for number, rank in enumerate(ranks):
            if (rank.returncode or 0) < 0:  # it could say nothing itself
                raise RendezvousError(
                    f"rank {number} was ended by {signal.Signals(-rank.returncode).name}, by a host without memory "
                    f"perhaps: evaluate again, with fewer --ranks"
                )
        return next((rank.returncode for rank in ranks if rank.returncode), 0)
    finally:
        for rank in ranks:
            rank.terminate()
        until = time.monotonic() + _LEAVE_SECONDS
        for rank in ranks:
            try:
                rank.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()


def join(asked: Mapping[str, Any]) -> tuple[Ranks, torch.device]:
    """This process among the ranks, which were all `asked` the same; alone where no launcher has started others."""
    local, on_gpu = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.is_available()
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(), device
    stop = StopRequest()
    leave_with_launcher(stop)
    meeting = meet(asked, stop)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # an evaluation has nothing to save
    assert meeting.store is not None
    # gloo on GPUs too: ranks exchange what is known of their images, once, at the end.
    store = dist.PrefixStore("evaluation", meeting.store)
    dist.init_process_group(
        "gloo", store=store, rank=meeting.rank, world_size=meeting.count, timeout=timedelta(hours=12)
    )
    torch.set_num_threads(own_threads(local_ranks(meeting.count)))
    return Ranks(meeting.rank, meeting.count), device
