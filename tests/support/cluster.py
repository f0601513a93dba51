"""Several hosts on one machine: network namespaces on a bridge, each with a name of its own, an /etc/hosts, processes
that see only each other, and an sshd.

    python -m tests.support.cluster [--hosts 3] [command]     a shell (or the command) on the first of them

What a host is here: its network, name and processes. Files and CPU cores are those of the machine, for all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

NEEDED = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "unshare": "util-linux"}
_READY_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def why_not() -> str | None:
    """Why this machine cannot play several hosts, in words; None where it can."""
    path = f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"
    missing = [package for name, package in NEEDED.items() if not shutil.which(name, path=path)]
    if missing:
        return f"{', '.join(missing)} (Debian's names) are not installed"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    done = _ip("netns", "add", name := f"hornet-try-{os.getpid()}", check=False)
    if done.returncode:
        return f"network namespaces are not permitted here: {done.stderr.strip()}"
    _ip("netns", "del", name, check=False)
    return None


class Cluster:
    """Hosts named node1, node2, ... that reach each other by ssh without a password, inside `with`.

    loopback: hosts whose own name is 127.0.1.1 to themselves, as Debian's installer has it. Raises RuntimeError where
    a host does not answer.
    """

    def __init__(self, count: int, folder: Path | None = None, loopback: Sequence[str] = ()) -> None:
        self.names = [f"node{number}" for number in range(1, count + 1)]
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="cluster-")
        self.folder = Path(self._temporary.name) if self._temporary else Path(str(folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._loopback = set(loopback)
        # Names of devices and namespaces are the machine's: a number that no other cluster of today has.
        self._lock = None
        self._number = -1
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        self._pids: dict[str, int] = {}  # of the first process of each host, seen from here

    def __enter__(self) -> Self:
        try:
            self._take_number()
            self._make_keys()
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("link", "set", self._bridge, "up")
            _ip("addr", "add", f"{self.address_of_machine}/24", "dev", self._bridge)
            for name in self.names:
                self._make_network(name)
            for name in self.names:
                self._boot(name)
            self._await_ssh()
        except BaseException:
            self._take_down()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._take_down()

    @property
    def _bridge(self) -> str:
        return f"hn{self._number}br"

    @property
    def address_of_machine(self) -> str:
        """By which hosts reach servers of this machine, outside of them (they have to listen on all addresses)."""
        return f"10.87.{self._number}.254"

    def address(self, name: str) -> str:
        return f"10.87.{self._number}.{self.names.index(name) + 1}"

    def _namespace(self, name: str) -> str:
        return f"hn{self._number}{name}"

    def hostfile(self, slots: int = 1, names: Sequence[str] = ()) -> Path:
        """A hostfile of all hosts, or of `names`."""
        names = names or self.names
        path = self.folder / f"hostfile-{'-'.join(names)}-{slots}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in names))
        return path

    def command(self, name: str, *arguments: str | Path, cwd: Path | None = None) -> list[str]:
        """What runs `arguments` on a host, in `cwd` or this folder."""
        enter = ["nsenter", "-t", str(self._pids[name]), "-n", "-u", "-m", "-p", f"--wd={cwd or os.getcwd()}"]
        return [*enter, *map(str, arguments)]

    def start(
        self, name: str, *arguments: str | Path, environment: Mapping[str, str] | None = None, **more: object
    ) -> subprocess.Popen[bytes]:
        """A process on a host; `more` is for Popen. The process that is returned is nsenter, which ends as it does."""
        command = self.command(name, *arguments, cwd=Path(str(more.pop("cwd", os.getcwd()))))
        return subprocess.Popen(command, env=dict(environment or os.environ), **more)  # type: ignore[call-overload]

    def run(self, name: str, *arguments: str | Path, timeout: float = 120, **more: object) -> str:
        """What a command on a host prints; raises CalledProcessError where it fails."""
        cwd = Path(str(more.pop("cwd", os.getcwd())))
        done = subprocess.run(
            self.command(name, *arguments, cwd=cwd), capture_output=True, text=True, timeout=timeout, check=True, **more
        )  # type: ignore[call-overload]
        return str(done.stdout)

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of a host but its sshd, and what nsenter runs there."""
        inside = os.readlink(f"/proc/{self._pids[name]}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                is_here = os.readlink(f"/proc/{process.pid}/ns/pid") == inside
                if is_here and process.status() != psutil.STATUS_ZOMBIE and "sshd" not in process.name():
                    found.append(process)
        return found

    def ranks(self, name: str) -> list[psutil.Process]:
        """The ranks of a run on a host: not their data workers."""
        found = []
        for process in self.processes(name):
            with suppress(psutil.Error):
                parent = process.parent()
                environment = process.environ()
                if "RANK" in environment and (parent is None or "RANK" not in parent.environ()):
                    found.append(process)
        return found

    def link(self, name: str, up: bool) -> None:
        """Pull a host's plug, or put it back."""
        _ip("link", "set", f"hn{self._number}v{self.names.index(name) + 1}", "up" if up else "down")

    def _take_number(self) -> None:
        for number in range(1, 250):
            lock = open(f"{tempfile.gettempdir()}/hornet-cluster-{number}.lock", "w")  # noqa: SIM115 - held until the end
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                continue
            self._lock, self._number = lock, number
            self._sweep()
            return
        raise RuntimeError("250 clusters are alive on this machine")

    def _make_keys(self) -> None:
        for name in ("host", "user"):
            key = self.folder / f"{name}.key"
            key.unlink(missing_ok=True)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        (self.folder / "authorized_keys").write_bytes((self.folder / "user.key.pub").read_bytes())
        # ssh does not heed $HOME: what it has to know stands in the host's own /etc/ssh/ssh_config.
        (self.folder / "ssh_config").write_text(
            f"Host *\n  IdentityFile {self.folder}/user.key\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
            f"  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        for name in self.names:
            (self.folder / f"sshd_config.{name}").write_text(
                f"HostKey {self.folder}/host.key\nAuthorizedKeysFile {self.folder}/authorized_keys\nUsePAM no\n"
                f"StrictModes no\nPermitRootLogin yes\nPidFile none\nPasswordAuthentication no\nMaxStartups 100\n"
                f"AcceptEnv none\n"
            )
            own = "127.0.1.1" if name in self._loopback else self.address(name)
            lines = ["127.0.0.1 localhost", f"{own} {name}", f"{self.address_of_machine} machine"]
            lines += [f"{self.address(other)} {other}" for other in self.names if other != name]
            (self.folder / f"hosts.{name}").write_text("\n".join(lines) + "\n")

    def _make_network(self, name: str) -> None:
        namespace, outer = self._namespace(name), f"hn{self._number}v{self.names.index(name) + 1}"
        _ip("netns", "add", namespace)
        _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", outer, "master", self._bridge, "up")
        for words in (("link", "set", "lo", "up"), ("addr", "add", f"{self.address(name)}/24", "dev", "eth0")):
            _ip("-n", namespace, *words)
        _ip("-n", namespace, "link", "set", "eth0", "up")

    def _boot(self, name: str) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        script = (
            f"hostname {name} && mount --bind {self.folder}/hosts.{name} /etc/hosts"
            f" && mount --bind {self.folder}/ssh_config /etc/ssh/ssh_config"
            f" && exec {shutil.which('sshd', path=_SYSTEM_PATH)} -D -e -f {self.folder}/sshd_config.{name}"
        )
        # Processes of its own too: DeepSpeed's launcher kills by pattern on every host.
        command = ["ip", "netns", "exec", self._namespace(name), "unshare", "-u", "-p", "-f", "--mount-proc"]
        with open(self.folder / f"sshd.{name}.log", "ab") as log:
            self._inits[name] = subprocess.Popen(
                [*command, "--kill-child", "bash", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": _SYSTEM_PATH},
                preexec_fn=_die_with_us,
            )

    def _await_ssh(self) -> None:
        end = time.monotonic() + _READY_SECONDS
        for name in self.names:
            while True:
                children = psutil.Process(self._inits[name].pid).children() if self._inits[name].poll() is None else []
                if children:
                    self._pids[name] = children[0].pid
                    done = subprocess.run(
                        self.command(name, "ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", name, "hostname"),
                        capture_output=True,
                        text=True,
                        check=False,
                    )
                    if done.stdout.strip() == name:
                        break
                if time.monotonic() > end:
                    raise RuntimeError(f"{name} does not answer: {(self.folder / f'sshd.{name}.log').read_text()}")
                time.sleep(0.1)

    def _take_down(self) -> None:
        for name, init in self._inits.items():
            # The first process of a host takes all of that host along.
            with suppress(ProcessLookupError, KeyError):
                os.kill(self._pids[name], signal.SIGKILL)
            init.kill()
            init.wait()
        if self._number > 0:
            self._sweep()
        if self._lock is not None:
            self._lock.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _sweep(self) -> None:
        """Remove what stands under our names: also that of a cluster whose process was killed."""
        for line in _ip("netns", "list", check=False).stdout.splitlines():
            if line.startswith(f"hn{self._number}node"):
                _ip("netns", "del", line.split()[0], check=False)
        _ip("link", "del", self._bridge, check=False)


def _die_with_us() -> None:
    """A host does not outlive the test run that was killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": _SYSTEM_PATH}
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False, env=environment)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run on node1 (bash)")
    options = parser.parse_args()
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    with Cluster(options.hosts) as cluster:
        print(f"{', '.join(cluster.names)}; hostfile: {cluster.hostfile()}", file=sys.stderr)
        return cluster.start("node1", *(options.command or ["bash"])).wait()


if __name__ == "__main__":
    sys.exit(main())
