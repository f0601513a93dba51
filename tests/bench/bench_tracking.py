"""What a step waits for MLflow: a real server is killed again and again while steps are logged to it.

    python tests/bench/bench_tracking.py [--kills 10] [--step 0.1]

Steps are products of matrices on one thread. Three ways in turn, in each round: MLflow's server is up, it is killed at
a random moment, and there is none; then it is started again. Prints a way's steps over the median step while the server
was up, and checks at the end that every number stands in MLflow once, as in log.jsonl. Exit code 1 where it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import mlflow

from pipeline.config.load import load
from pipeline.records.sender import Sender
from pipeline.records.tracking import Tracker
from tests.pipeline.records.test_tracking import start_server

STEPS = 60  # a round
WAYS = ("server up", "server killed", "no server")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--step", type=float, default=0.1, help="seconds of a step, roughly")
    options = parser.parse_args()
    torch.set_num_threads(1)
    Sender.retry_seconds = 1.0  # as often as the rounds are short
    draw, sides = random.Random(0), torch.randn(1024, 1024)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        uri = f"http://127.0.0.1:{port}"
        config = load("configs/demo_pretrain.yaml", [f"output_root={root}", f"tracking.uri={uri}"])
        config.run_dir.mkdir(parents=True)
        began, products = time.perf_counter(), 20
        for _ in range(products):
            sides @ sides
        products = max(1, round(products * options.step / (time.perf_counter() - began)))
        server = start_server(root, port)
        tracker, step = Tracker(config, {}, 0), 0
        for number in range(options.kills):
            for way in WAYS:
                dies = draw.randrange(5, STEPS - 5) if way == "server killed" else None
                for each in range(STEPS):
                    if each == dies:
                        os.killpg(server.pid, signal.SIGKILL)
                        server.wait()
                    began = time.perf_counter()
                    for _ in range(products):
                        sides @ sides
                    step += 1
                    tracker.log(step, {"loss": 1 / step, "lr": 0.1 / step}, "")
                    times[way].append(time.perf_counter() - began)
            server = start_server(root, port)
            print(f"round {number + 1} of {options.kills}", file=sys.stderr, flush=True)
        tracker.finish("FINISHED", [])
        lines = [json.loads(line) for line in (config.run_dir / "log.jsonl").read_text().splitlines()]
        client = mlflow.MlflowClient(uri)
        same = True
        for key in ("loss", "lr"):
            found = sorted((m.step, m.value) for m in client.get_metric_history(str(tracker.run_id), key))
            same &= found == [(line["step"], line[key]) for line in lines]
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    median = statistics.median(times["server up"])
    print("| | steps | median / median of server up | 99th percentile | slowest |\n|---|---|---|---|---|")
    for way, seconds in times.items():
        ordered = sorted(seconds)
        shown = [statistics.median(ordered), ordered[int(0.99 * len(ordered))], ordered[-1]]
        print(f"| {way} | {len(ordered)} | {' | '.join(f'{each / median:.2f}' for each in shown)} |")
    print(f"{len(lines)} lines, {options.kills} kills: MLflow has {'each once, the same' if same else 'others'}")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
