"""A Slurm of our own for a test: slurmctld, two nodes' slurmd and munged, on this machine, for as long as it takes.

All of it stands in namespaces of its own (processes, mounts, network): its ports are nobody else's, n1 and n2 are names
that resolve, and it ends with its first process, jobs and all, however the test ends. What it writes is in one folder.

Jobs are tracked by proctrack/linuxproc, as cgroups cannot be had everywhere: a signal to a step reaches every process
of it, launchers and ranks alike. With proctrack/cgroup, which clusters have, it reaches the task alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.processes import PATIENCE_SECONDS
from tests.support.runs import ROOT

NODES = {"n1": "10.77.0.1", "n2": "10.77.0.2"}
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "setpriv", "ip")
# cgroup.conf: slurmd ends when it does not find out which version it has, even where nothing uses cgroups.
_CONF = """
ClusterName=test
SlurmctldHost=n1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={0}/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
OverTimeLimit=5
GresTypes=gpu
SlurmdParameters=config_overrides
StateSaveLocation={0}/state
SlurmdSpoolDir={0}/spool-%n
SlurmdPidFile={0}/%n.pid
SlurmctldPidFile={0}/slurmctld.pid
SlurmdLogFile={0}/%n.log
SlurmctldLogFile={0}/slurmctld.log
SchedulerParameters=batch_sched_delay=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={1}
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
_NODE = "NodeName={} NodeAddr={} Port={} CPUs=4 RealMemory=4096 Gres=gpu:2\n"
# The first process, whose end ends the rest. With a loopback interface alone Slurm finds no address to listen at.
_START = """
set -e
ip link set lo up
ip link add eth0 type bridge
ip addr add 10.77.0.1/24 dev eth0
ip addr add 10.77.0.2/24 dev eth0
ip link set eth0 up
hostname n1
mount --bind {0}/hosts /etc/hosts
munged --foreground --force --key-file={0}/munge/key --socket={0}/munge/socket --pid-file={0}/munge/pid \
  --log-file={0}/munge/log --seed-file={0}/munge/seed &
until [ -S {0}/munge/socket ]; do sleep 0.05; done
slurmctld -D -i -c &
for node in n1 n2; do unshare --uts bash -c "hostname $node; exec slurmd -D -N $node" & done
wait -n
"""


class Slurm:
    """One that runs. folder: its configuration and logs; checkout: where its commands run, and leave a job's logs."""

    def __init__(self, folder: Path, process: psutil.Process) -> None:
        self.folder, self.process = folder, process
        self.checkout = folder / "checkout"

    def command(self, *words: str) -> list[str]:
        """What runs `words` on the node n1."""
        pid = str(self.process.pid)
        inside = ["nsenter", "--target", pid, "--mount", "--uts", "--pid", "--net", "env", f"SLURM_CONF={self.conf}"]
        return [*inside, "sh", "-c", 'cd "$0" && exec "$@"', str(self.checkout), *words]

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def run(self, *words: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def ask(self, *words: str) -> str:
        """The output of one of Slurm's commands, which has to succeed."""
        done = self.run(*words)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode and so on."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """Until a job is in one of `states`; returns what `job` does."""
        end = time.monotonic() + PATIENCE_SECONDS
        while (known := self.job(job))["JobState"] not in states:
            told = {name: known[name] for name in ("JobState", "Reason", "ExitCode", "Restarts")}
            assert known["JobState"] not in _ENDED, told
            assert time.monotonic() < end, told
            time.sleep(0.2)
        return known

    def again(self, job: str, *settings: str) -> int:
        """Start a job that was queued again, without its two minutes of waiting. Returns how often it was queued again.

        Not at once: a node that has just been told to end the job takes what starts in the same second for that one,
        and Slurm 22.05 then ends it for good ("already killed, do not launch batch job").
        """
        restarts = int(self.wait(job, "PENDING")["Restarts"])
        time.sleep(2.0)
        self.ask("scontrol", "update", f"jobid={job}", "starttime=now", *settings)
        self.wait(job, "RUNNING")
        return restarts

    def processes(self) -> list[str]:
        """The command lines of what jobs run now."""
        found = []
        for process in self.process.children(recursive=True):
            try:
                line = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            if line and not any(name in line[0] for name in ("munged", "slurmctld", "slurmscriptd", "slurmd")):
                found.append(" ".join(line))
        return found


def why_no_slurm() -> str:
    """Why it cannot be started here; empty where it can."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in _PROGRAMS if shutil.which(name, path=path) is None]:
        return f"{', '.join(missing)} missing: apt-get install slurm-wlm munge iproute2"
    done = subprocess.run(
        ["unshare", "-m", "-u", "-n", "-p", "-f", "true"], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else f"no namespaces here: {done.stderr.strip()}"


@contextmanager
def running_slurm(folder: Path, grace_seconds: int = 0) -> Iterator[Slurm]:
    """Two nodes n1 and n2 of 4 CPUs and 2 GPUs (which are /dev/null), partitions low (the default) and high; jobs in
    low are queued again for those in high, `grace_seconds` after they are told. Skips where there is no Slurm; fails
    there in continuous integration.
    """
    if why := why_no_slurm():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    for name in ("munge", "state", "checkout"):
        (folder / name).mkdir(mode=0o700)
    for name in ("launch", "pipeline", "data_prep", "configs"):
        (folder / "checkout" / name).symlink_to(ROOT / name)
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    (folder / "munge" / "key").chmod(0o400)
    for gpu in ("gpu0", "gpu1"):
        os.mknod(folder / gpu, 0o20666, os.makedev(1, 3))  # with Count= in place of File= the nodes drain
    nodes = "".join(_NODE.format(name, ip, 7000 + i) for i, (name, ip) in enumerate(NODES.items()))
    (folder / "slurm.conf").write_text(_CONF.format(folder, grace_seconds) + nodes)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-1]\n")
    names = "".join(f"{ip} {name}\n" for name, ip in NODES.items())
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    start = ["setpriv", "--pdeathsig", "KILL", "unshare", "-m", "-u", "-n", "-p", "-f", "--mount-proc", "--kill-child"]
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    with open(folder / "log", "wb") as log:
        outer = subprocess.Popen(
            [*start, "bash", "-c", _START.format(folder)],
            env={**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield _answering(folder, outer)
    finally:
        # Not SIGTERM, which unshare ignores while it waits.
        everything = psutil.Process(outer.pid).children(recursive=True) if outer.poll() is None else []
        outer.kill()
        outer.wait()
        psutil.wait_procs(everything, timeout=PATIENCE_SECONDS)


def _answering(folder: Path, outer: subprocess.Popen[bytes]) -> Slurm:
    """As soon as both nodes are idle."""
    end = time.monotonic() + 120
    slurm, said = None, ""
    while outer.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
        if slurm is None:
            if children := psutil.Process(outer.pid).children():
                slurm = Slurm(folder, children[0])
            continue
        done = slurm.run("sinfo", "--noheader", "--partition=low", "--format=%D %T")
        said = done.stdout + done.stderr
        if done.stdout == "2 idle\n":
            return slurm
    pytest.fail(f"Slurm did not start: {said}\n{(folder / 'log').read_text()[-3000:]}")
