"""Give back the disk space of prepared images that are in finished shards already.

A data file holds its images in the order of the shuffle, so what the first shards took is the beginning of every data
file. A hole is punched there: the build then needs the size of its result once, and little more, instead of twice.
Where the file system cannot (NFS, Lustre, object stores), nothing happens and the space is free at the end.
"""

import ctypes
import json
import os
import sys
import tempfile

import numpy as np

from data_prep.ledger import Rows
from data_prep.storage import TEMP_MARK, Folder, LostWorkError

RECORD = "reclaimed.json"
STEPS = 20  # holes are punched when another twentieth of the shards is done
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


class Reclaimer:
    """Follows which training shards are finished. Nothing is given back before `val_done`.

    rows: all rows; order (samples,) int: the training samples in shard order.
    """

    def __init__(self, rows: Rows, order: np.ndarray, samples_per_shard: int, work: Folder):
        self.rows, self.order, self.samples_per_shard, self.work = rows, order, samples_per_shard, work
        self.shards = -(-len(order) // samples_per_shard)
        self.finished: set[int] = set()
        self.able = work.is_local and sys.platform == "linux"
        self.given_back = json.loads(work.read(RECORD))["shards"] if work.exists(RECORD) else 0

    def check(self, finished: set[int]) -> None:
        """Raise LostWorkError when a shard whose images were given back is gone."""
        lost = set(range(self.given_back)) - finished
        if lost:
            raise LostWorkError(
                f"train-{min(lost):06d}.tar of the unfinished build was removed or changed, and its images are "
                "given back already: give --force to begin anew"
            )
        self.finished = set(finished)

    def finish(self, shard: int | None, *, val_done: bool) -> None:
        """Note a finished training shard (None: one of val); punch holes when enough are done."""
        if shard is not None:
            self.finished.add(shard)
        first_open = self.given_back
        while first_open in self.finished:
            first_open += 1
        if self.able and val_done and first_open - self.given_back >= max(1, self.shards // STEPS):
            # The record first: a hole must never be taken for images.
            self.work.write(RECORD, json.dumps({"shards": first_open}).encode())
            self.given_back = first_open
            self._punch(first_open)

    def _punch(self, shards: int) -> None:
        at = shards * self.samples_per_shard
        needed = self.rows.offset >= 0
        if at < len(self.order):
            needed &= self.rows.order >= self.rows.order[self.order[at]]
        else:
            needed[:] = False
        offset = np.where(needed, self.rows.offset, np.iinfo(np.int64).max)
        for number, name in enumerate(self.rows.chunks):
            first, last = int(self.rows.start[number]), int(self.rows.start[number + 1])
            if first == last:
                continue
            path = self.work.folder("chunks").join(f"{name}.data")
            stop = min(int(offset[first:last].min()), os.stat(path).st_size)
            if stop and not _punch_hole(path, stop):
                self.able = False
                return


def can_punch_holes(folder: Folder) -> bool:
    """Whether the file system of a folder, which need not exist yet, gives space back."""
    if not folder.is_local or sys.platform != "linux":
        return False
    path = os.path.abspath(folder.url)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=f".probe{TEMP_MARK}") as file:
            file.write(bytes(1 << 16))
            file.flush()
            return _punch_hole(file.name, 1 << 15)
    except OSError:
        return False


def _punch_hole(path: str, stop: int) -> bool:
    """Free the blocks of bytes [0, stop) of a file; False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    file = os.open(path, os.O_WRONLY)
    try:
        return libc.fallocate64(file, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, stop) == 0
    finally:
        os.close(file)
