"""The encoded images of a rank, as its micro-batches ask for them, out of lanes that read ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from pipeline.config.load import Config
from pipeline.config.sections import ConfigError
from pipeline.data.order import MicroBatch, SampleOrder
from pipeline.data.shards import DataError
from pipeline.data.stream.manifest import StreamedSet
from pipeline.data.stream.route import Counted, Item, Route, ShardLengths, Uncounted
from pipeline.data.stream.shard import Classes, StreamedImage, samples_of
from pipeline.data.stream.urls import Opener

_CHUNK = 16  # samples that a lane hands over at a time
_LOOK_SECONDS = 0.5  # how often a lane that waits for room looks whether it is still wanted

Found = tuple[int, int, Item]  # epoch, sample id, item


def check_lanes(config: Config, found: StreamedSet, ranks: int | None) -> None:
    """Raise ConfigError where lanes and shards, or lanes and ranks, do not fit."""
    lanes, shards = config.data.shuffle_lanes, len(found.urls["train"])
    if ranks is not None and lanes % ranks:
        raise ConfigError(
            f"data.reader=stream: each lane is read by one rank, and {ranks} ranks do not divide data.shuffle_lanes "
            f"{lanes}: use a number of ranks that does, or set it to a multiple of {ranks} (a new order: a new run)"
        )
    if "train" not in found.counted and shards < lanes:
        raise ConfigError(
            f"data.path names {shards} shards, fewer than data.shuffle_lanes {lanes}: set that to {shards} or less"
        )


def _source(config: Config, found: StreamedSet, order: SampleOrder, lengths: ShardLengths) -> Counted | Uncounted:
    read = partial(samples_of, opener=Opener(config.data), classes=Classes(found.manifest.synsets))
    skip = config.data.on_bad_sample == "skip"
    if "train" in found.counted:
        return Counted(found.urls["train"], order.shard_samples, read, skip)
    return Uncounted(found.urls["train"], order, read, skip, lengths)


def read_again(config: Config, found: StreamedSet, order: SampleOrder, lengths: ShardLengths, step: int) -> int:
    """Samples that all ranks together read once more, to go on with the run's step `step`."""
    source, (epoch, in_epoch) = _source(config, found, order, lengths), divmod(step, order.steps_per_epoch)
    return sum(source.read_again(order, epoch, lane, in_epoch) for lane in range(order.lanes))


class StreamReader:
    """The images of one rank in the order in which they are asked for, which has to be that of the run.

    Lanes begin to read, a thread each, at the first that is asked for: after data workers are forked.
    """

    random_access = False
    fetch_threads: int | None = 1  # more would ask out of turn
    shard_count = 0  # that somebody else would have to fetch
    remote: object = None

    def __init__(
        self, lanes: Mapping[int, Callable[[int, int], Lane]], order: SampleOrder | None, rank: int, ranks: int
    ):
        self._make, self._order, self._rank, self._ranks = lanes, order, rank, ranks
        self._lanes: dict[int, Lane] = {}
        self._step, self._micro = -1, 0

    @classmethod
    def training(
        cls,
        config: Config,
        found: StreamedSet,
        order: SampleOrder,
        rank: int,
        ranks: int,
        last_step: int,
        lengths: ShardLengths,
    ) -> StreamReader:
        """The training samples of a rank, up to the run's step `last_step`. Raises ConfigError as `check_lanes`."""
        check_lanes(config, found, ranks)
        source = _source(config, found, order, lengths)
        route: Route = source.along(order) if isinstance(source, Counted) else source
        last_epoch = (last_step - 1) // order.steps_per_epoch
        lanes = {
            lane: partial(Lane.of_training, route, order, lane, last_epoch) for lane in order.lanes_of(rank, ranks)
        }
        return cls(lanes, order, rank, ranks)

    @classmethod
    def evaluation(cls, config: Config, found: StreamedSet, begin: int, end: int) -> StreamReader:
        """The validation samples with the ids begin .. end - 1, in their order."""
        read = partial(samples_of, opener=Opener(config.data), classes=Classes(found.manifest.synsets))
        counted = Counted(found.urls["val"], [e.samples for e in found.manifest.split("val").shards], read, False)

        def lane(epoch: int, _: int) -> Lane:
            return Lane(((epoch, *each) for each in counted.between(begin, end)), 4 * _CHUNK)

        return cls({0: lane}, None, 0, 1)

    def __len__(self) -> int:
        return 0  # none that could be had out of turn

    def encoded_batch(self, micro: MicroBatch) -> Sequence[StreamedImage | DataError]:
        """The images of a micro-batch; an error stands in its sample's place."""
        order = self._order
        assert order is not None
        epoch, in_epoch = divmod(micro.step, order.steps_per_epoch)
        self._micro = self._micro + 1 if micro.step == self._step else 0
        self._step = micro.step
        first = self._rank * (order.global_batch // self._ranks) + self._micro * len(micro.samples)
        lanes = [order.lane_of(first + slot) for slot in range(len(micro.samples))]
        return self._take(epoch, in_epoch, micro.samples.tolist(), lanes)

    def encoded_many(self, samples: Sequence[int] | np.ndarray) -> list[StreamedImage | DataError]:
        """The images of an evaluation, in order; an error stands in its sample's place."""
        return self._take(0, 0, [int(sample) for sample in samples], [0] * len(samples))

    def label_of(self, sample: int, data: bytes) -> int:
        assert isinstance(data, StreamedImage)
        return data.label

    def damaged(self, sample: int, reason: object, data: bytes = b"") -> DataError:
        """The error for a sample whose bytes were read but are no image."""
        where = data.where if isinstance(data, StreamedImage) else f"sample {sample}"
        return DataError(f"{where} does not decode: {reason}; data.on_bad_sample=skip trains without")

    def ahead(self, shards: Sequence[int]) -> None:
        """Lanes read ahead by themselves."""

    def close(self) -> None:
        """End the lanes."""
        for lane in self._lanes.values():
            lane.close()

    def _take(self, epoch: int, step: int, samples: list[int], lanes: list[int]) -> list[StreamedImage | DataError]:
        if not self._lanes:  # all at once: each has to wait for its first window
            self._lanes = {lane: make(epoch, step) for lane, make in self._make.items()}
        taken: list[StreamedImage | DataError] = []
        for sample, lane in zip(samples, lanes, strict=True):
            try:
                taken.append(self._lanes[lane].take(epoch, sample))
            except DataError as error:
                taken.append(error)
        return taken


class Lane:
    """Reads on in a thread, as far as there is room, and holds what was read until it is its turn."""

    def __init__(self, found: Iterator[Found], room: int, taken: frozenset[tuple[int, int]] = frozenset()):
        """`room`: samples read ahead of those that are held; `taken`: (epoch, id) of those that are wanted no more."""
        self._found, self._taken = found, taken
        self._queue: queue.Queue[list[Found] | BaseException] = queue.Queue(max(1, room // _CHUNK))
        self._held: dict[tuple[int, int], Item] = {}
        self._last: tuple[tuple[int, int], Item] | None = None
        self._failure: BaseException | None = None
        self._epoch = -1
        self._closed = threading.Event()
        threading.Thread(target=self._read, name="lane", daemon=True).start()

    @classmethod
    def of_training(
        cls, route: Route, order: SampleOrder, lane: int, last_epoch: int, epoch: int, first_step: int
    ) -> Lane:
        """From step `first_step` of `epoch` on, through the epochs to come."""

        def found() -> Iterator[Found]:
            for number in range(epoch, last_epoch + 1):
                for sample, item in route(number, lane, first_step if number == epoch else 0):
                    yield number, sample, item

        taken = order.taken_before(epoch, lane, first_step).tolist()
        return cls(found(), order.buffer_samples or _CHUNK, frozenset((epoch, sample) for sample in taken))

    def take(self, epoch: int, sample: int) -> StreamedImage:
        """A sample, once it is read. With repeats the same one several times in a row. Raises DataError."""
        key = (epoch, sample)
        if self._last is None or self._last[0] != key:
            if epoch != self._epoch:  # the last samples of an epoch may be in none of its steps
                self._held = {held: item for held, item in self._held.items() if held[0] >= epoch}
                self._epoch = epoch
            while key not in self._held:
                self._receive(key)
            self._last = (key, self._held.pop(key))
        item = self._last[1]
        if isinstance(item, DataError):
            raise item
        return item

    def close(self) -> None:
        """The thread ends, and closes what it reads, when it next looks."""
        self._closed.set()

    def _receive(self, key: tuple[int, int]) -> None:
        if self._failure is None:
            told = self._queue.get()
            if isinstance(told, list):
                self._held |= {(epoch, sample): item for epoch, sample, item in told}
                for seen in self._taken & self._held.keys():
                    del self._held[seen]
                return
            self._failure = told
        raise self._failure

    def _read(self) -> None:
        chunk: list[Found] = []
        try:
            for each in self._found:
                chunk.append(each)
                if len(chunk) == _CHUNK:
                    if not self._put(chunk):
                        return
                    chunk = []
            self._put(chunk)
            self._put(DataError("the stream has ended before its last sample: that is a fault of this program"))
        except BaseException as error:
            if self._put(chunk):
                self._put(error if isinstance(error, DataError) else RuntimeError(f"a lane has failed: {error!r}"))
        finally:
            close = getattr(self._found, "close", None)
            if close is not None:
                close()

    def _put(self, told: list[Found] | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(told, timeout=_LOOK_SECONDS)
                return True
            except queue.Full:
                continue
        return False
