"""How long a run over ssh goes on after one of its hosts is lost: its plug is pulled at a random moment of training.

    python tests/bench/bench_lost_host.py [--trials 10] [--stall 15]

Two or three hosts in turn, a rank each; any of them may be the lost one, that of rank 0 and the launcher too (it then
names the others). Prints the seconds until the command has ended, until nothing is left on any host (the lost one too),
and whether the host was named. The baseline is guard.stall_seconds. Needs root: hosts are network namespaces.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.cluster import Cluster, why_not
from tests.support.datasets import build_datasets
from tests.support.hosts import Hosts
from tests.support.processes import wait_for


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--stall", type=float, default=15.0, help="guard.stall_seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if reason := why_not():
        parser.error(reason)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    draw, ended, gone, named = random.Random(options.seed), [], [], 0
    print("| hosts | lost | at step | command ended, s | nothing left, s | named |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary, Cluster(3) as cluster:
        hosts = Hosts(cluster, build_datasets(Path(temporary) / "data"), Path(temporary))
        for trial in range(options.trials):
            names = cluster.names[: 2 + trial % 2]
            lost, step, name = draw.choice(names), draw.randrange(2, 60), f"trial-{trial}"
            job = hosts.start(name, names, f"guard.stall_seconds={options.stall}", "train.epochs=100")
            wait_for(lambda job=job, name=name, step=step: hosts.last_step(name) >= step, job.process, job.said)
            cluster.link(lost, up=False)
            cut = time.monotonic()
            job.wait()
            ended.append(time.monotonic() - cut)
            hosts.nothing_is_left(600.0)
            gone.append(time.monotonic() - cut)
            cluster.link(lost, up=True)
            seen = "node2" if lost == "node1" else lost  # from the launcher's host
            is_named = any(f"on {seen}" in line for line in job.said().splitlines() if "error: " in line)
            named += is_named
            row = f"{len(names)} | {lost} | {step} | {ended[-1]:.0f} | {gone[-1]:.0f} | {'yes' if is_named else 'no'}"
            print(f"| {row} |", flush=True)
    for what, seconds in (("the command ended", ended), ("nothing was left", gone)):
        low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
        ratio = middle / options.stall
        print(f"{what} after {middle:.0f} s ({low:.0f} to {high:.0f}): {ratio:.2f} of guard.stall_seconds")
    print(f"the host was named in {named} of {options.trials}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
