"""Which shards a lane reads in an epoch, from which sample on: what a resumed run finds its place by.

Where the samples of every shard are known (dataset.json, _info.json), a lane is its part of `order.py`'s line, and each
sample of the set stands in an epoch once. Where only their sum is known, a lane goes round its own shards, every n-th
of the shuffled ones, until it has given its part of the epoch: some samples may come twice, some not. What it learns of
shards meanwhile is kept with the run: a run that goes on passes whole shards over, and meets what it met before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data_prep.credentials import without_credentials
from pipeline.data.keyed import uniform_one
from pipeline.data.order import SampleOrder, shuffled_shards
from pipeline.data.shards import DataError
from pipeline.data.stream.shard import LostSample, StreamedImage
from pipeline.ranks.log_file import LogFile

_OTHER_SHARDS = 8  # tried in the place of one that cannot be read

Item = StreamedImage | LostSample
ReadShard = Callable[[str], Generator[Item, None, None]]


class Route(Protocol):
    """(sample id, item) of a lane, in stream order, from the window on in which step `first_step` of `epoch` begins.

    Raises DataError where a shard fails, unless samples may be skipped.
    """

    def __call__(self, epoch: int, lane: int, first_step: int) -> Iterator[tuple[int, Item]]: ...


class Counted:
    """The route through shards whose samples are known; `shards` as in the order that it follows."""

    def __init__(self, urls: Sequence[str], samples: Sequence[int], read: ReadShard, skip: bool) -> None:
        self.urls, self.samples, self.read, self.skip = urls, samples, read, skip
        self.first_ids = np.cumsum(samples) - np.asarray(samples)

    def along(self, order: SampleOrder) -> Route:
        def route(epoch: int, lane: int, first_step: int) -> Iterator[tuple[int, Item]]:
            return self.pieces(epoch, order.stream(epoch, lane, first_step))

        return route

    def read_again(self, order: SampleOrder, epoch: int, lane: int, first_step: int) -> int:
        """Samples that a lane reads and drops to begin there."""
        first = next(order.stream(epoch, lane, first_step), (0, 0, 0))
        return first[1] + len(order.taken_before(epoch, lane, first_step))

    def between(self, begin: int, end: int) -> Iterator[tuple[int, Item]]:
        """The samples with the ids begin .. end - 1, in their order."""
        found = []
        for shard, (first, size) in enumerate(zip(self.first_ids.tolist(), self.samples, strict=True)):
            skipped, stop = max(0, begin - first), min(size, end - first)
            if skipped < stop:
                found.append((shard, skipped, stop - skipped))
        return self.pieces(0, iter(found))

    def pieces(self, epoch: int, pieces: Iterator[tuple[int, int, int]]) -> Iterator[tuple[int, Item]]:
        """What is taken of (shard, skipped, taken), in turn."""
        for shard, skipped, taken in pieces:
            yield from self._piece(epoch, shard, skipped, taken)

    def _piece(self, epoch: int, shard: int, skipped: int, taken: int) -> Iterator[tuple[int, Item]]:
        url, wanted, first_id = self.urls[shard], self.samples[shard], int(self.first_ids[shard])
        number = 0
        samples = self.read(url)
        try:
            for item in samples:
                if number == wanted:
                    raise DataError(_differs(url, f"more than the {wanted:,}"))
                if skipped <= number < skipped + taken:
                    yield first_id + number, item
                number += 1
                if number == skipped + taken < wanted:
                    return
            if number < wanted:
                raise DataError(_differs(url, f"{number:,} samples, not the {wanted:,}"))
        except DataError as error:
            if not self.skip:
                raise
            # From the first that is lost, wherever this lane begins: a run that goes on gets the same.
            places = range(number, skipped + taken)
            for lost, stand_in in zip(places, self._stand_ins(epoch, shard, str(error)), strict=False):
                if lost >= skipped:
                    yield first_id + lost, stand_in
        finally:
            samples.close()

    def _stand_ins(self, epoch: int, shard: int, fault: str) -> Iterator[StreamedImage]:
        """Images of other shards, drawn by key, for what a shard has lost. Raises DataError at their end."""
        for attempt in range(_OTHER_SHARDS):
            other = int(uniform_one((epoch << 32) ^ shard, attempt) * len(self.urls))
            samples = self.read(self.urls[other])
            number = -1
            try:
                for number, item in enumerate(samples):
                    if isinstance(item, StreamedImage) and other != shard:
                        item.lost, item.stand_in = fault, int(self.first_ids[other]) + number
                        yield item
            except DataError:
                continue
            finally:
                samples.close()
        raise DataError(f"{fault}; of {_OTHER_SHARDS} other shards none could take its place")


def _differs(url: str, found: str) -> str:
    return (
        f"shard {without_credentials(url)} holds {found} that dataset.json or _info.json says: it is of another build, "
        "or cut; copy it again, or write _info.json again"
    )


class Learned(NamedTuple):
    """What was met in a shard: its samples, and the error that ended it, or ""."""

    samples: int
    fault: str


class Fault(NamedTuple):
    """A shard has ended before its time; what comes behind it says so."""

    text: str


class ShardLengths:
    """What a run has learned of its shards, by their numbers: JSON lines in `folder` (RUN/stream), a file a lane.

    Only what `writes` adds to the files; None as `folder` keeps it in memory.
    """

    def __init__(self, folder: Path | None = None, writes: bool = False) -> None:
        self.folder, self.writes = folder, writes
        self._files: dict[int, LogFile] = {}
        self._known: dict[int, Learned] = {}
        for path in sorted(folder.glob("lane-*.jsonl")) if folder else ():
            for line in path.read_bytes().splitlines():
                try:
                    told = json.loads(line)
                    self._known[told["shard"]] = Learned(told["samples"], told["fault"])
                except (ValueError, KeyError):  # the last line of a killed run may be cut
                    break

    @classmethod
    def of_run(cls, run_dir: Path, writes: bool = False) -> ShardLengths:
        return cls(run_dir / "stream", writes)

    def get(self, shard: int) -> Learned | None:
        return self._known.get(shard)

    def add(self, lane: int, shard: int, learned: Learned) -> None:
        if self._known.get(shard) == learned:
            return
        self._known[shard] = learned
        if self.folder is None or not self.writes:
            return
        file = self._files.get(lane)
        if file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self._files[lane] = LogFile(self.folder / f"lane-{lane:05}.jsonl")
            file.cut(lambda line: bool(json.loads(line)))
        file.append(json.dumps({"shard": shard, **learned._asdict()}))


class Uncounted:
    """The route through shards of which only the sum of an epoch's samples is known."""

    def __init__(
        self, urls: Sequence[str], order: SampleOrder, read: ReadShard, skip: bool, lengths: ShardLengths
    ) -> None:
        self.urls, self.order, self.read, self.skip, self.lengths = urls, order, read, skip, lengths

    def __call__(self, epoch: int, lane: int, first_step: int) -> Iterator[tuple[int, Item]]:
        order = self.order
        ((_, begin, taken),) = order.stream(epoch, lane, first_step)  # the whole set is one shard here
        end = begin + taken
        place = lane * (order.samples // order.lanes)
        mine = shuffled_shards(len(self.urls), order.seed, epoch)[lane :: order.lanes].tolist()
        fault = ""
        while True:
            before = place
            for shard in mine:
                for item in self._shard(lane, shard, begin - place):
                    if isinstance(item, int):
                        place, fault = place + item, "" if item else fault  # told with the first of them
                        continue
                    if isinstance(item, Fault):
                        fault = item.text
                        continue
                    if fault and isinstance(item, StreamedImage):
                        item.lost, item.stand_in, fault = fault, place, ""
                    if place >= begin:
                        yield place, item
                    place += 1
                    if place == end:
                        return
            if place == before:
                why = fault or f"{without_credentials(self.urls[mine[0]])}, ..."
                raise DataError(f"none of the {len(mine)} shards of lane {lane} holds a sample: {why}")

    def read_again(self, order: SampleOrder, epoch: int, lane: int, first_step: int) -> int:
        """Samples that a lane reads and drops to begin there: none of shards that are known."""
        ((_, begin, _),) = order.stream(epoch, lane, first_step)
        left = begin - lane * (order.samples // order.lanes)
        mine = shuffled_shards(len(self.urls), order.seed, epoch)[lane :: order.lanes].tolist()
        for shard in mine:
            known = self.lengths.get(shard)
            if known is None or known.samples > left:
                break
            left -= known.samples
        return left + len(order.taken_before(epoch, lane, first_step))

    def _shard(self, lane: int, shard: int, left: int) -> Iterator[Item | int | Fault]:
        """The items of a shard; in place of the first `left` or fewer, where they are known, their number."""
        known = self.lengths.get(shard)
        if known is not None and known.samples <= left:
            yield known.samples
        else:
            number, fault = 0, ""
            samples = self.read(self.urls[shard])
            try:
                for item in samples:
                    if known is not None and number == known.samples:
                        break
                    yield item
                    number += 1
            except DataError as error:
                if not self.skip:
                    raise
                fault = str(error)
            finally:
                samples.close()
            if known is not None and number < known.samples:
                raise DataError(
                    f"shard {without_credentials(self.urls[shard])} holds {number:,} samples, {known.samples:,} when "
                    f"this run read it before{': ' + fault if fault else ''}: bring back what was there, or begin anew"
                )
            if known is None:
                known = Learned(number, fault)
                self.lengths.add(lane, shard, known)
        if known.fault:
            yield Fault(known.fault)
