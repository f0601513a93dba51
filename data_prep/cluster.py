"""Where the work runs: in this process, on Dask worker processes of this machine, or on a Dask cluster.

A task is a picklable function of one argument. Results come in the order in which they are finished, and only a
few tasks per worker are under way, so a long list of tasks may be a generator that makes them one by one.
"""

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, TypeVar

from data_prep.storage import DataPrepError, number, user_path

TASKS_PER_WORKER = 2  # one at work, one waiting: a worker is never idle, memory and spool stay bounded
ALLOWED_DEATHS = 5  # of workers with the same task in hand, until the task is thought to be what kills them

START_ATTEMPTS = 3
POLL_SECONDS = 1  # for an interrupt, and for workers that went
NO_WORKERS_SECONDS = 300
SLURM_LOOK_SECONDS = 10  # between looks at jobs that no worker has come from yet

T = TypeVar("T")
R = TypeVar("R")


class ClusterError(DataPrepError):
    """The Dask cluster is not there, is gone, or its workers keep dying."""


class Cluster(Protocol):
    """Something that runs tasks."""

    def run(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Yield (task, function(task)) for every task, in the order of completion."""
        ...

    def slots(self) -> int:
        """How many tasks run at the same time now."""
        ...


class InProcess:
    """One task after the other, in this process."""

    def run(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[T, R]]:
        for task in tasks:
            yield task, function(task)

    def slots(self) -> int:
        return 1


class DaskCluster:
    """Tasks on the workers of a connected Dask client."""

    def __init__(self, client: Any, interrupts: "Interrupts"):
        self.client = client
        self.interrupts = interrupts

    def slots(self) -> int:
        try:
            return max(1, sum(self.client.nthreads().values()))
        except OSError:
            raise ClusterError(_scheduler_gone(self.client)) from None

    def run(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[T, R]]:
        from concurrent.futures import CancelledError

        from distributed import wait
        from distributed.client import FutureCancelledError
        from distributed.comm import CommClosedError
        from distributed.scheduler import KilledWorker

        pending = iter(tasks)
        under_way: dict[Any, T] = {}
        more, seen_workers = True, time.monotonic()
        try:
            while True:
                while more and len(under_way) < TASKS_PER_WORKER * self.slots():
                    self.interrupts.check()
                    try:
                        task = next(pending)
                    except StopIteration:
                        more = False
                        break
                    under_way[self.client.submit(function, task, pure=False)] = task
                if not under_way:
                    return
                try:
                    done = wait(list(under_way), timeout=POLL_SECONDS, return_when="FIRST_COMPLETED").done
                except TimeoutError:
                    done = set()
                self.interrupts.check()
                if self.client.nthreads():
                    seen_workers = time.monotonic()
                elif time.monotonic() - seen_workers > NO_WORKERS_SECONDS:
                    raise ClusterError("all workers are gone: start some, then give the same command again")
                for future in done:
                    task = under_way.pop(future)
                    result = future.result()
                    future.release()
                    yield task, result
        except KilledWorker:
            raise ClusterError(
                f"{ALLOWED_DEATHS + 1} workers died, one after the other, with the same work in hand ({task}): "
                "most often for lack of memory; use fewer --workers, then give the same command again"
            ) from None
        except (CancelledError, FutureCancelledError, CommClosedError):
            raise ClusterError(_scheduler_gone(self.client)) from None
        finally:
            for future in under_way:
                future.release()


class Interrupts:
    """Notes Ctrl-C while Dask's code runs, where an exception could come at any line and be lost; `check` raises it.

    Worker processes of this machine ignore Ctrl-C: they are ended by the command.
    """

    def __init__(self) -> None:
        self.noted = False

    def check(self) -> None:
        if self.noted:
            raise KeyboardInterrupt

    def _note(self, *_: Any) -> None:
        self.noted = True

    def held(self) -> AbstractContextManager[None]:
        """Ctrl-C is noted, not raised."""
        return self._handling(self._note)

    def ignored(self) -> AbstractContextManager[None]:
        """For starting processes, which inherit it."""
        return self._handling(signal.SIG_IGN)

    @contextmanager
    def _handling(self, handler: Any) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # no other may set handlers
            yield
            return
        before = signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _scheduler_gone(client: Any) -> str:
    address = getattr(getattr(client, "scheduler", None), "address", "?")
    return f"the Dask scheduler at {address} is gone: start it again, then give the same command again"


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say where the work runs."""
    add = parser.add_argument_group("where it runs").add_argument
    add(
        "--workers",
        type=number(1),
        default=available_cpus(),
        metavar="N",
        help="worker processes on this machine; 1: work in this process (default: one per CPU, here %(default)s)",
    )
    add(
        "--scheduler",
        type=user_path,
        metavar="ADDRESS",
        help="use the workers of a Dask cluster: tcp://HOST:8786, or the scheduler file that `dask scheduler` wrote; "
        "all of its machines must see the paths given here",
    )
    add("--slurm-jobs", type=number(1), metavar="N", help="start N Slurm jobs of Dask workers (package dask-jobqueue)")
    add(
        "--slurm-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of dask_jobqueue.SLURMCluster, such as queue=cpu, cores=32, memory=64GB, walltime=08:00:00",
    )


@contextmanager
def open_cluster(args: argparse.Namespace) -> Iterator[Cluster]:
    """The cluster that the options of `add_cluster_arguments` ask for. Raises ClusterError."""
    if args.scheduler and args.slurm_jobs:
        raise ClusterError("--scheduler and --slurm-jobs exclude each other: give one of them")
    if args.slurm_jobs and shutil.which("sbatch") is None:  # dask-jobqueue would wait for its workers for ever
        raise ClusterError("--slurm-jobs needs Slurm, and there is no sbatch here: use a login node of the cluster")
    if args.scheduler is None and args.slurm_jobs is None and args.workers <= 1:
        yield InProcess()
        return
    import dask
    from distributed import Client

    interrupts = Interrupts()

    logging.getLogger("distributed").setLevel(logging.ERROR)  # a worker that died is started again: not our user's news
    # An image's bytes are short-lived, but the C library keeps what was freed: Dask must not take that for a leak.
    dask.config.set(
        {
            "distributed.scheduler.allowed-failures": ALLOWED_DEATHS,
            "distributed.worker.memory.spill": False,
            "distributed.worker.memory.target": False,
            "distributed.worker.memory.pause": False,  # a paused worker would wait for ever
            "distributed.comm.timeouts.connect": "10s",
        }
    )
    if args.scheduler:
        try:
            known = (
                {"scheduler_file": args.scheduler} if os.path.isfile(args.scheduler) else {"address": args.scheduler}
            )
            client = Client(**known, timeout="10s")
        except (OSError, ValueError, TimeoutError) as error:
            raise ClusterError(
                f"no Dask scheduler answers at {args.scheduler} ({error or 'timed out'}): "
                "start one with `dask scheduler`"
            ) from None
        with client:
            if not client.nthreads():
                raise ClusterError(
                    f"the Dask scheduler at {args.scheduler} has no workers: start some with `dask worker`"
                )
            with interrupts.held():
                yield DaskCluster(client, interrupts)
        return
    if args.slurm_jobs:
        cluster = slurm_cluster(args.slurm_option)
    else:
        with interrupts.ignored():
            cluster = _local_cluster(args.workers)
    with cluster, Client(cluster) as client:
        if args.slurm_jobs:
            _start_slurm_jobs(cluster, client, args.slurm_jobs)
        client.wait_for_workers(1)
        with interrupts.held():
            yield DaskCluster(client, interrupts)


def _local_cluster(workers: int) -> Any:
    from distributed import LocalCluster

    for _ in range(START_ATTEMPTS):
        try:
            return LocalCluster(
                n_workers=workers, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL
            )
        except RuntimeError as error:  # a worker was killed while it started
            failure = error
    raise ClusterError(
        f"the {workers} workers did not start ({failure}): is there memory for as many? Use fewer --workers"
    )


def slurm_cluster(options: list[str]) -> Any:
    """A dask_jobqueue.SLURMCluster made of KEY=VALUE options. Raises ClusterError when it cannot be."""
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise ClusterError(
            "--slurm-jobs needs the package dask-jobqueue: .venv/bin/pip install dask-jobqueue"
        ) from None
    settings: dict[str, Any] = {"processes": None}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ClusterError(f"--slurm-option {option} is not KEY=VALUE")
        settings[key] = int(value) if value.isdigit() else value
    # One process a core: decoding holds the interpreter's lock.
    settings["processes"] = settings["processes"] or settings.get("cores")
    try:
        return SLURMCluster(**settings)
    except (TypeError, ValueError) as error:
        raise ClusterError(f"dask-jobqueue does not accept these --slurm-option settings: {error}") from None


def _start_slurm_jobs(cluster: Any, client: Any, count: int) -> None:
    """Submit them, and wait for the first worker. Raises ClusterError where Slurm refuses, or all have ended before."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:  # a refusal of dask-jobqueue's own sbatch is lost
        script.write(cluster.job_script())
        script.flush()
        done = subprocess.run(["sbatch", "--test-only", script.name], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ClusterError(f"Slurm does not accept such jobs ({said}): other --slurm-option settings are needed")
    limit = next((line.split()[-1] for line in cluster.job_script().splitlines() if line.startswith("#SBATCH -t ")), "")
    cluster.scale(jobs=count)
    print(
        f"{count} Slurm jobs submitted, for {limit or 'as long as Slurm lets them'} (walltime=); work begins when the "
        "first one runs",
        file=sys.stderr,
    )
    while not client.nthreads():
        with suppress(TimeoutError):
            client.wait_for_workers(1, timeout=SLURM_LOOK_SECONDS)
        jobs = [str(worker.job_id) for worker in cluster.workers.values() if worker.job_id]
        if not client.nthreads() and len(jobs) == count and not _any_queued(jobs):
            raise ClusterError(
                f"all {count} Slurm jobs ended before a worker came from them: slurm-{jobs[0]}.out, in this folder or "
                "in --slurm-option log_directory=, says why"
            )


def _any_queued(jobs: list[str]) -> bool:
    """Whether one of Slurm's jobs waits or runs; so it is where Slurm does not tell."""
    done = subprocess.run(
        ["squeue", "--noheader", "--jobs", ",".join(jobs), "--states", "PENDING,RUNNING,SUSPENDED,CONFIGURING"],
        capture_output=True,
        text=True,
        check=False,
    )
    return bool(done.stdout.strip()) or (done.returncode != 0 and "Invalid job id" not in done.stderr)
