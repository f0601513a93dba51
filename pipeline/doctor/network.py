"""An all-reduce over all hosts, as the run's ranks would do it: whether they find each other, and how fast it is.

    python -m pipeline.doctor.network BACKEND END

is one rank, by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, until time.time() is END at the latest.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from pipeline.doctor.report import Finding, Report, each

_MIB = 1 << 20
_SIZES = {"gloo": (_MIB, 8 * _MIB, 64 * _MIB), "nccl": (_MIB, 64 * _MIB, 1024 * _MIB)}
# For ranks that were alone, to say so. One whose peer cannot connect to it waits five times its timeout (gloo of torch
# 2.15), and is ended.
_LAST_SECONDS = 5.0
_SECONDS_A_SIZE, _ROUNDS = 1.0, 20
# One ring of TCP connections, driven by one core: gloo gets no more out of a faster link.
_GLOO_GBIT = 10.0
_SLOW = {"gloo": 0.1, "nccl": 0.5}  # of the link: less is worth a look
_RESULT = "all-reduce: "


def look() -> Report:
    """The links of this host: Gbit/s of the interface of its own name and of each active InfiniBand port."""
    return {"ethernet": _ethernet(), "infiniband": _infiniband()}


def _ethernet() -> dict[str, Any]:
    with suppress(OSError):
        own = {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)}
        for name, addresses in psutil.net_if_addrs().items():
            if own & {address.address for address in addresses}:
                return {"interface": name, "gbit": max(0, psutil.net_if_stats()[name].speed) / 1000}
    return {"interface": None, "gbit": 0}


def _infiniband() -> list[float]:
    rates = []
    for rate in Path("/sys/class/infiniband").glob("*/ports/*/rate"):
        with suppress(OSError, ValueError, IndexError):
            if "ACTIVE" in rate.with_name("state").read_text():
                rates.append(float(rate.read_text().split()[0]))  # "400 Gb/sec (4X NDR)"
    return rates


def run_ranks(
    started: list[subprocess.Popen[str]],
    first: int,
    count: int,
    world: int,
    address: str,
    port: int,
    backend: str,
    seconds: float,
) -> Report:
    """Start this host's ranks of the all-reduce, and wait for them: {"ranks": [what each says, or its error]}.

    `started` is filled with them, so that the caller can end them early.
    """
    end = time.monotonic() + seconds
    for local in range(count):
        environment = {
            "RANK": str(first + local),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(local),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        command = [sys.executable, "-m", "pipeline.doctor.network", backend, str(time.time() + seconds - _LAST_SECONDS)]
        started.append(
            subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        )
    return {"ranks": [_outcome(process, max(1.0, end - time.monotonic())) for process in started]}


def _outcome(process: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    try:
        told, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"waited for the others in vain ({seconds:.0f} s)"}
    for line in told.splitlines():
        if line.startswith(_RESULT):
            return dict(json.loads(line.removeprefix(_RESULT)))
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
    return {"error": lines[-1][:300]}


def _rank(backend: str, end: float) -> dict[str, Any]:
    """Seconds of one all-reduce by bytes; an error in words."""
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    began = time.monotonic()
    dist.init_process_group(backend, timeout=timedelta(seconds=max(1.0, end - time.time())))
    joined = time.monotonic() - began
    times = {}
    for size in _SIZES[backend]:
        tensor = torch.full((size // 4,), float(rank + 1), device=device)
        dist.all_reduce(tensor)
        if not bool((tensor == world * (world + 1) / 2).all()):
            return {"error": f"an all-reduce of {size} bytes gave a wrong sum"}
        times[size] = _seconds(tensor, device)
    dist.destroy_process_group()
    return {"joined_seconds": joined, "seconds": times}


def _seconds(tensor: Any, device: Any) -> float:
    """Of one all-reduce: the mean of as many as fit into a second, the same number on all ranks."""
    import torch
    import torch.distributed as dist

    def timed(rounds: int) -> float:
        tensor.zero_()
        dist.barrier()
        began = time.monotonic()
        for _ in range(rounds):
            dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.monotonic() - began) / rounds

    once = torch.tensor([timed(1)], device=device)
    dist.all_reduce(once, op=dist.ReduceOp.MAX)
    return timed(max(1, min(_ROUNDS, int(_SECONDS_A_SIZE / float(once)))))


def judge(answers: Mapping[str, Report], links: Mapping[str, Report], backend: str, world: int) -> list[Finding]:
    """Which ranks did not take part, or the bandwidth against what the slowest link of the hosts should give."""
    told = {host: report.get("ranks", [report]) for host, report in answers.items()}
    errors = {host: next((rank["error"] for rank in ranks if "error" in rank), "") for host, ranks in told.items()}
    if any(errors.values()):
        advice = "see to firewalls between the hosts, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (NCCL_DEBUG=INFO tells)"
        return each("all-reduce", "fail", {host: why for host, why in errors.items() if why}, advice)
    seconds: dict[str, float] = {}
    for ranks in told.values():
        for rank in ranks:
            for size, took in rank["seconds"].items():
                seconds[size] = max(took, seconds.get(size, 0.0))
    factor = 2 * (world - 1) / world  # what a ring sends, of each rank's bytes
    gbit = {int(size): factor * int(size) * 8 / took / 1e9 for size, took in seconds.items()}
    best = max(gbit.values())
    sizes = ", ".join(f"{rate:.2g} Gbit/s at {size // _MIB} MiB" for size, rate in gbit.items())
    text = f"{world} ranks, {backend}: {sizes} of ring traffic a rank"
    if len(told) == 1:
        return [Finding("all-reduce", "pass", f"{text}; what NVLink or PCIe should give is not known here")]
    rate, what, host = _slowest(links, backend)
    if not rate:
        return [Finding("all-reduce", "pass", f"{text}; what the link should give is not known: {what}")]
    text = f"{text}; {what} on {host}: {rate:g} Gbit/s"
    if best < _SLOW[backend] * (min(rate, _GLOO_GBIT) if backend == "gloo" else rate):
        advice = "is that the right interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_IB_HCA), and is it free?"
        return [Finding("all-reduce", "warn", text, advice)]
    return [Finding("all-reduce", "pass", text)]


def _slowest(links: Mapping[str, Report], backend: str) -> tuple[float, str, str]:
    """(Gbit/s, of what, host) of the host whose links give least; 0 where a host does not say."""
    rates = {}
    for host, report in links.items():
        ports = report.get("infiniband", []) if backend == "nccl" else []
        if ports:
            rates[host] = (sum(ports), f"InfiniBand, {len(ports)} ports,")
        else:
            ethernet = report.get("ethernet", {})
            rates[host] = (float(ethernet.get("gbit", 0)), ethernet.get("interface") or "no interface of its own name")
    host = min(rates, key=lambda name: rates[name][0])
    return (*rates[host], host)


def main(backend: str, end: float) -> int:
    """One rank; what came of it is a line on stdout."""
    try:
        told = _rank(backend, end)
    except Exception as error:  # torch's and NCCL's own
        words = " ".join(str(error).split())
        told = {"error": words[:300] or type(error).__name__}
    print(_RESULT + json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1], float(sys.argv[2]))
    os._exit(code)  # a process group whose peers are gone may not end
