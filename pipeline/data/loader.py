"""Batches for one rank, in the order of `order.py`, from either file format.

Both formats yield the same sample ids in the same batches. What works where:

    format      augment.where   workers_per_rank are   the workers make
    webdataset  host            processes              normalised images, by timm on PIL
    webdataset  device          threads of one process uint8 crops (crops.py); the rest runs on the device
    ffcv        either          FFCV's threads, in one uint8 crops; with host, timm on PIL follows in that process

With data.reader=stream the tars are read by one process of each rank: the one that makes the crops, or one that hands
the encoded images to the workers.

Evaluation is by threads of one process throughout, and hands out uint8.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from data_prep.manifest import Manifest
from pipeline.config.load import Config
from pipeline.data.augment import HostAugment
from pipeline.data.beton import EvaluationBeton, TrainingBeton
from pipeline.data.beton_file import beton_path
from pipeline.data.crops import TrainingCrops
from pipeline.data.evaluation import EvaluationImages
from pipeline.data.mixture import TrainingOrder
from pipeline.data.opened import open_reader
from pipeline.data.order import MicroBatch, SampleOrder
from pipeline.data.ring import PREFETCHED_BATCHES, BatchPlace, Ring, RingBatch, RingClosed
from pipeline.data.shards import DataError, EncodedReader
from pipeline.data.stream.manifest import streamed_set
from pipeline.data.stream.reader import StreamReader
from pipeline.data.stream.route import ShardLengths
from pipeline.data.views import Batch, Drawn, Views, numbers_of
from pipeline.ranks.collectives import Ranks

_DEAD_WORKER = ("DataLoader worker (pid", "DataLoader timed out")
_SILENT_SECONDS = 600  # a worker that yields nothing for so long is dead or hangs; FFCV compiles for up to a minute
_OUTLIVE_SECONDS = 60  # a worker that got SIGTERM serves its rank for so long: the rank's last step, not all of its end


def training_batches(
    config: Config,
    manifest: Manifest,
    order: TrainingOrder,
    ranks: Ranks,
    first_step: int,
    last_step: int,
    lengths: ShardLengths | None = None,
) -> Iterator[Batch]:
    """Micro-batches of one rank for optimizer steps first_step .. last_step - 1, across epochs.

    `lengths`: what the run has learned of shards of which nobody has counted the samples, see stream/route.py.

    Raises DataError when a sample cannot be read or the workers stop answering.
    """
    span = (ranks.rank, ranks.count, first_step, last_step)
    if config.data.format == "ffcv":
        assert isinstance(order, SampleOrder)
        path = beton_path(config.data.folder, manifest, "train")
        return worker_batches(TrainingBeton(path, config, order, *span), 1, batch_size=None)
    reader: EncodedReader
    if config.data.reader == "stream":
        assert isinstance(order, SampleOrder)
        found = streamed_set(config.data, manifest)
        reader = StreamReader.training(config, found, order, *span[:2], last_step, lengths or ShardLengths())
    else:
        reader = open_reader(config.data, manifest, "train")
    views = Views(config, reader)
    workers = config.data.workers_per_rank
    if config.augment.where == "device":
        return worker_batches(TrainingCrops(config, views, order, *span), min(workers, 1), batch_size=None)
    items: Iterable[Any] = order.micro_batches(first_step, last_step, *span[:2], config.train.micro_batch)
    if isinstance(reader, StreamReader):  # a stream has one reader: workers get their images from its process
        items = worker_batches(_Streamed(reader, items), min(workers, 1), batch_size=None, pinned=False)
    return worker_batches(_TrainingImages(config, views, order, *span[:2]), workers, batch_sampler=items)


def validation_batches(config: Config, manifest: Manifest, ranks: Ranks) -> Iterator[Batch]:
    """Every validation sample exactly once over all ranks: rank r takes samples r, r + R, r + 2R, ..., or the r-th of
    R parts of a stream.

    Images are uint8. Ranks may yield different numbers of batches: hold no collective inside the loop over them.
    A sample that does not decode raises DataError whatever data.on_bad_sample says: accuracy is that of the whole set.
    """
    samples = manifest.split("val").samples
    mine = np.arange(ranks.rank, samples, ranks.count)
    if config.data.reader == "stream":  # a part without gaps: others' shards need not be read
        mine = np.arange(ranks.rank * samples // ranks.count, (ranks.rank + 1) * samples // ranks.count)
    batches = [mine[i : i + config.evaluate.micro_batch] for i in range(0, len(mine), config.evaluate.micro_batch)]
    if config.data.format == "ffcv":
        path = beton_path(config.data.folder, manifest, "val")
        return worker_batches(EvaluationBeton(path, config, batches), 1, batch_size=None)
    reader: EncodedReader
    if config.data.reader == "stream":
        begin, end = (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)
        reader = StreamReader.evaluation(config, streamed_set(config.data, manifest), begin, end)
    else:
        reader = open_reader(config.data, manifest, "val")
    return worker_batches(
        EvaluationImages(config, reader, batches), min(config.data.workers_per_rank, 1), batch_size=None
    )


def seekable_batches(config: Config, reader: EncodedReader, samples: np.ndarray, ranks: Ranks) -> Iterator[Batch]:
    """This rank's part of `samples` (ids of a reader that can seek), as `validation_batches` gives that of a split."""
    mine, size = samples[ranks.rank :: ranks.count], config.evaluate.micro_batch
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    return worker_batches(
        EvaluationImages(config, reader, batches), min(config.data.workers_per_rank, 1), batch_size=None
    )


class _Streamed(IterableDataset[Any]):
    """(micro-batch, the data of its images): what one process reads for the workers of a rank."""

    def __init__(self, reader: StreamReader, micros: Iterable[MicroBatch]) -> None:
        self.reader, self.micros = reader, micros

    def __iter__(self) -> Iterator[tuple[MicroBatch, Sequence[bytes | DataError]]]:
        for micro in self.micros:
            yield micro, self.reader.encoded_batch(micro)


class _TrainingImages(Dataset[Any]):
    """Whole micro-batches, augmented by timm; one at a time in each worker process."""

    def __init__(self, config: Config, views: Views, order: TrainingOrder, rank: int, ranks: int) -> None:
        self.config, self.views, self.order, self.rank, self.ranks = config, views, order, rank, ranks
        self.reader = views.reader
        self.ahead_of = -1
        workers, bytes_per_image = config.data.workers_per_rank, 4 * 3 * config.data.largest_resolution**2
        self.ring = Ring(config.train.micro_batch * bytes_per_image, workers=workers) if workers else None
        self.augment = lru_cache(maxsize=2)(lambda side: HostAugment(config.augment, side))

    def __getitems__(
        self, asked: MicroBatch | tuple[MicroBatch, Sequence[bytes | DataError]]
    ) -> Batch | RingBatch | DataError | RingClosed:
        reader = self.reader
        drawn: list[Drawn] = []
        micro, streamed = (asked, None) if isinstance(asked, MicroBatch) else asked
        if streamed is None and micro.step >= self.ahead_of:
            reader.ahead(self.order.shards_ahead(micro.step, self.rank, self.ranks))
            self.ahead_of = micro.step + 16
        side = self.config.data.resolution_at(micro.epoch)
        augment = self.augment(side)

        def render(data: bytes, key: int) -> None:
            place.images[len(drawn)] = augment(data, key).numpy()

        try:
            place = BatchPlace(self.ring, len(micro.samples), side, "float32")
            encoded = reader.encoded_batch(micro) if streamed is None else streamed
            for sample, key, data in zip(micro.samples.tolist(), self.views.keys(micro), encoded, strict=True):
                drawn.append(self.views.draw(sample, micro, key, data, render, encoded))
        except (DataError, RingClosed) as error:
            return error
        return place.batch(*numbers_of(drawn, micro.views))


def _as_is(item: Any) -> Any:
    return item


def _start_worker(parent: int, _: int) -> None:
    torch.set_num_threads(1)  # several processes share each core; more threads cost several times the CPU time
    # A rank killed with SIGKILL cannot end its workers: the kernel does, at once, even inside FFCV's compiler.
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    # What asks a run to stop reaches its data workers too: SIGTERM by DeepSpeed's and torchrun's launchers, SIGUSR1 by
    # some Slurms, SIGINT by Ctrl-C. The rank answers, and needs its batches until then.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Blocked, for all threads to come, and awaited in one: torch's handler, in C, would end the worker.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_by_sigterm, args=(parent,), name="sigterm", daemon=True).start()


def _end_by_sigterm(parent: int) -> None:
    """Leave at once where the rank asks for it, as a DataLoader does at its end, else later."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        later = threading.Timer(_OUTLIVE_SECONDS, os._exit, [0])
        later.daemon = True
        later.start()
    os._exit(0)  # any other code would be a failure to a rank that takes no more batches


def worker_batches(
    source: Dataset[Any],
    workers: int,
    batch_size: int | None = 1,
    batch_sampler: Iterable[Any] | Sequence[Any] | None = None,
    pinned: bool = True,
) -> Iterator[Any]:
    """What `source` yields, made by so many processes, which end with the rank; 0: by the rank itself.

    `source` hands over what it cannot read as an exception, which is raised here. Raises DataError where the workers
    are gone, or silent.
    """
    # The omp layer of numba, which FFCV compiles with, does not survive a fork; read when numba is first imported.
    os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
    options: dict[str, Any] = {"batch_size": batch_size}
    if batch_sampler is not None:
        options = {"batch_sampler": batch_sampler}
    if workers:
        options |= {"prefetch_factor": PREFETCHED_BATCHES, "timeout": _SILENT_SECONDS}
        options["worker_init_fn"] = partial(_start_worker, os.getpid())
        options["multiprocessing_context"] = "fork"  # the datasets' arrays are shared, not pickled
    pin = pinned and torch.cuda.is_available()
    loader = DataLoader(source, num_workers=workers, pin_memory=pin, collate_fn=_as_is, **options)
    return _raising(loader)


def _raising(loader: DataLoader[Any]) -> Iterator[Batch]:
    iterator = iter(loader)  # by name: it ends its workers when it is dropped, after what is below
    failure = ""
    try:
        for item in iterator:
            if isinstance(item, Exception):
                raise item  # a worker hands its error over whole: raised there, it would come back as a traceback
            yield item.batch() if isinstance(item, RingBatch) else item
    except RuntimeError as error:
        text = str(error)
        if not any(mark in text for mark in _DEAD_WORKER):
            raise
        failure = f"a data worker was killed or silent for {_SILENT_SECONDS} s: {text.splitlines()[0]}"
    finally:
        for part in (getattr(loader.dataset, "ring", None), getattr(loader.dataset, "reader", None)):
            if part is not None:
                part.close()  # else a worker that waits for a buffer would not see that it is to end
        del iterator
    # Not inside the handler: torch's error would keep its iterator alive, and every child that ends then raise anew.
    if failure:
        raise DataError(failure)
