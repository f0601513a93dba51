"""What the block shuffle costs in bytes and in randomness: ImageNet-22K in 1 GB shards on many nodes. Needs no data.

    python tests/bench/bench_order.py [--nodes 64] [--lanes 1 16 64 128] [--windows 1 2 4 8 16] [--chosen 64 4]

The order is the project's own (SampleOrder); a node is its ranks' streams together, and three nodes stand for all.

- reading, in the second epoch: whole shards, downloaded when one of their samples is read, into an LRU cache of 20, 100
  or 400 GB a node; "ahead" is how pipeline/data/remote.py goes about it with 100 GB: what is needed next is downloaded
  as far as it fits, before it is read; what does not fit is read image by image. GB are those of a node and epoch, with
  their ratio to what the node trains on. Range requests alone always read just that: ratio 1.
- shuffle: "together" is how much likelier than in a uniform shuffle two samples of one shard are in one batch; "again",
  how much likelier two samples of one batch are in one batch of the next epoch too.
- cost: the order in a process of its own, against torch's DistributedSampler; CPU seconds and memory above imports.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.data.order import SampleOrder

SHARDS, SHARD_SAMPLES, SHARD_GB = 1420, 10_000, 1.0
CACHES_GB, AHEAD_GB = (20, 100, 400), 100
AHEAD_STEPS = 16  # how often the loader says which shards are next; of that order at any micro-batch size


class Reading(NamedTuple):
    gigabytes: float
    ratio: float
    hit_rate: float


def order_of(lanes: int, window: int, global_batch: int) -> SampleOrder:
    return SampleOrder((SHARD_SAMPLES,) * SHARDS, global_batch, 0, lanes, window)


class Stream(NamedTuple):
    """A node's epoch: for each step its shards and the number of samples from each, and the samples of all steps."""

    steps: list[tuple[list[int], np.ndarray]]
    samples: int


def node_stream(order: SampleOrder, epoch: int, node: int, nodes: int) -> Stream:
    # A node's ranks take neighbouring slices of a batch: together they are one rank of `nodes`.
    shards = order.rank_steps(epoch, 0, order.steps_per_epoch, node, nodes)[0] // SHARD_SAMPLES
    counts = (np.bincount(step, minlength=SHARDS) for step in shards)
    return Stream([(np.flatnonzero(count).tolist(), count) for count in counts], shards.size)


def least_recently_used(stream: Stream, cache_gb: float, cache: OrderedDict[int, None]) -> Reading:
    """Whole shards, downloaded when one of their samples is read; `cache` is what it held before and holds after."""
    downloads = 0
    for shards, _ in stream.steps:
        for shard in shards:
            if shard in cache:
                cache.move_to_end(shard)
            else:
                downloads += 1
                cache[shard] = None
                if len(cache) * SHARD_GB > cache_gb:
                    cache.popitem(last=False)
    return reading(downloads * SHARD_GB, downloads, stream.samples)


def read_ahead(
    order: SampleOrder, first_step: int, node: int, nodes: int, stream: Stream, cache: OrderedDict[int, None]
) -> Reading:
    """As pipeline/data/remote.py would with a fast network: see there."""
    downloads = ranged = 0
    for first in range(0, len(stream.steps), AHEAD_STEPS):
        wanted = order.shards_ahead(first_step + first, node, nodes)
        for shard in wanted:
            if shard in cache:
                cache.move_to_end(shard)
        listed = set(wanted)
        for shard in wanted:
            if shard in cache:
                continue
            if (len(cache) + 1) * SHARD_GB > AHEAD_GB:
                evicted = next((old for old in cache if old not in listed), None)
                if evicted is None:
                    break
                del cache[evicted]
            cache[shard] = None
            downloads += 1
        absent = np.ones(SHARDS, bool)
        absent[list(cache)] = False
        ranged += sum(int(counts[absent].sum()) for _, counts in stream.steps[first : first + AHEAD_STEPS])
    return reading((downloads + ranged / SHARD_SAMPLES) * SHARD_GB, ranged, stream.samples)


def reading(gigabytes: float, misses: int, samples: int) -> Reading:
    return Reading(gigabytes, gigabytes / (samples / SHARD_SAMPLES * SHARD_GB), 1 - misses / samples)


def mean(readings: Sequence[Reading]) -> Reading:
    return Reading(*np.mean(np.array(readings), axis=0).tolist())


def open_shards(order: SampleOrder, node: int, nodes: int) -> tuple[float, int]:
    """(mean, peak) number of shards in the windows that a node is in."""
    counts = [len(order.shards_ahead(step, node, nodes, 1)) for step in range(0, order.steps_per_epoch, AHEAD_STEPS)]
    return float(np.mean(counts)), max(counts)


def sampled_nodes(nodes: int) -> list[int]:
    return sorted({0, nodes // 3, nodes - 1})


def cell(found: Reading) -> str:
    return f"{found.gigabytes:,.0f} ({found.ratio:.2f}) {found.hit_rate:.1%}"


def reading_table(cases: Iterable[tuple[SampleOrder, int]], title: str) -> Table:
    """`cases`: an order and nodes."""
    table = Table("lanes", "window", "nodes", "batch", "open shards", title=title)
    for name in (*(f"LRU {size} GB" for size in CACHES_GB), f"ahead {AHEAD_GB} GB"):
        table.add_column(name, justify="right")
    for order, nodes in cases:
        by_cache: list[list[Reading]] = [[] for _ in range(len(CACHES_GB) + 1)]
        windows = []
        for node in sampled_nodes(nodes):
            caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in by_cache]
            for epoch in (0, 1):  # the first one only fills the caches
                stream, start = node_stream(order, epoch, node, nodes), epoch * order.steps_per_epoch
                found = [least_recently_used(stream, *each) for each in zip(CACHES_GB, caches, strict=False)]
                found.append(read_ahead(order, start, node, nodes, stream, caches[-1]))
            for readings, last in zip(by_cache, found, strict=True):
                readings.append(last)
            windows.append(open_shards(order, node, nodes))
        opened = f"{np.mean([each[0] for each in windows]):.1f}, peak {max(each[1] for each in windows)}"
        numbers = (order.lanes, order.window_shards, nodes, order.global_batch)
        table.add_row(*map(str, numbers), opened, *(cell(mean(readings)) for readings in by_cache))
    return table


def shuffle_row(order: SampleOrder, batches: int) -> tuple[float, float, float, int]:
    """(shards in a batch, together, again, largest share of a batch met again in one batch), over some batches."""
    last = order.steps_per_epoch
    step_of = np.empty(order.samples, np.int32)
    step_of[order.permutation(1)] = np.arange(order.samples) // order.global_batch
    drawn, shards, within, again, largest = 0, 0, 0, 0, 0
    for step in np.linspace(0, last - 1, batches).astype(int):
        samples = order.rank_steps(0, step, step + 1, 0, 1)[0][0]
        counts = np.bincount(samples // SHARD_SAMPLES)
        met = np.bincount(step_of[samples])
        drawn, shards = drawn + 1, shards + int((counts > 0).sum())
        within, again = within + int((counts * (counts - 1)).sum()), again + int((met * (met - 1)).sum())
        largest = max(largest, int(met.max()))
    pairs = drawn * order.global_batch * (order.global_batch - 1)
    uniform_within = (SHARD_SAMPLES - 1) / (order.samples - 1)
    uniform_again = (order.global_batch - 1) / (order.samples - 1)
    return shards / drawn, within / pairs / uniform_within, again / pairs / uniform_again, largest


def shuffle_table(orders: Sequence[SampleOrder], batches: int) -> Table:
    columns = ("lanes", "window", "shards in a batch", "together", "again", "most of a batch met again at once")
    table = Table(*columns, title="shuffle (1 is uniform)")
    for order in orders:
        shards, together, again, largest = shuffle_row(order, batches)
        name = "all" if order.window_shards >= SHARDS else str(order.window_shards)
        share = f"{largest} ({largest / order.global_batch:.2%})"
        table.add_row(str(order.lanes), name, f"{shards:,.0f}", f"{together:.2f}", f"{again:.3f}", share)
    return table


COSTS = {
    "DistributedSampler, one epoch": "for _ in torch_order(): pass",
    "ours, first batch at epoch 60, step 3000": "next(batches(60 * order.steps_per_epoch + 3000))",
    "ours, an epoch of one rank of 512": "for _ in batches(0): pass",
    "ours, an epoch, one rank of one": "for _ in batches(0, 0, 1): pass",
}
PRELUDE = """
import time
from pipeline.data.order import SampleOrder
lanes, window = {lanes}, {window}
order = SampleOrder(({samples},) * {shards}, 4096, 0, lanes, window)
def batches(step, rank=511, ranks=512):
    return order.micro_batches(step, step + order.steps_per_epoch, rank, ranks, 8 if ranks > 1 else 64)
def torch_order():
    return iter(DistributedSampler(range(order.samples), 512, 511))
{imports}
def peak():  # not getrusage's, which begins with what the parent had
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before, begun = peak(), time.process_time()
{code}
print(time.process_time() - begun, peak() - before)
"""


def cost_table(lanes: int, window: int) -> Table:
    table = Table(
        "what", "CPU-s", "peak MB", title=f"cost of the order, lanes {lanes}, window {window}, 14.2 M samples"
    )
    for name, code in COSTS.items():
        imports = "from torch.utils.data import DistributedSampler" if "torch" in code else ""
        numbers = {"lanes": lanes, "window": window, "samples": SHARD_SAMPLES, "shards": SHARDS}
        script = PRELUDE.format(code=code, imports=imports, **numbers)
        printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
        seconds, peak = map(float, printed.split())
        table.add_row(name, f"{seconds:.3f}", f"{peak / 1e6:,.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--chosen", type=int, nargs=2, default=[64, 4], metavar=("LANES", "WINDOW"))
    parser.add_argument("--batches", type=int, default=32, help="batches that the shuffle is judged by")
    options = parser.parse_args()
    console = Console(width=150)
    grid = [order_of(lanes, window, 4096) for lanes in options.lanes for window in options.windows]
    title = "GB that a node reads in an epoch (ratio to what it trains on), hit rate of sample reads"
    console.print(reading_table([(order, options.nodes) for order in grid], title))
    lanes, window = options.chosen
    of_nodes = [(order_of(lanes, window, 4096), nodes) for nodes in (1, 8, 16, 64)]
    # 48 nodes of 8 ranks do not divide 4096.
    of_nodes += [(order_of(each, window, 4608), 48) for each in (lanes, 48, 192)]
    console.print(reading_table(of_nodes, title))
    console.print(shuffle_table([*grid, order_of(1, SHARDS, 4096)], options.batches))
    console.print(cost_table(lanes, window))
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    console.print(f"{time.process_time() + children.ru_utime:.0f} CPU-s, peak {own.ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
