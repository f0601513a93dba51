"""One process of ours on each host, over ssh: a question is a line of JSON into it, the answer a line out of it.

So no shell reads anything but a folder and a path, and nothing of a configuration stands on a command line.
"""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "doctor: "  # what a login shell prints by itself has not
HERE = "localhost"  # the name of the only host, where there is no hostfile
CONNECT_SECONDS = 10
PING_SECONDS = 10.0  # between signs of life: a host that hears none for a minute takes us for gone
_SSH_FAILED = 255  # ssh's own exit code, where it is not the command's


class HostError(ValueError):
    """A host that was not reached, or does not answer any more; `advice` is what to do."""

    def __init__(self, text: str, advice: str) -> None:
        super().__init__(text)
        self.advice = advice


class Agent:
    """The process on one host. host None: this one, without ssh."""

    def __init__(self, host: str | None, folder: Path, python: str = sys.executable, ssh_port: int | None = None):
        self.host, self.folder = host, folder
        own = [python, "-m", "pipeline.doctor.host"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the agent
        self._lines: queue.Queue[str | None] = queue.Queue()
        try:
            self._process = subprocess.Popen(
                own if host is None else [*_ssh(ssh_port), host, f"cd {shlex.quote(str(folder))} && exec {_word(own)}"],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                errors="replace",
            )
        except FileNotFoundError:
            raise HostError("ssh is not installed, by which hosts are reached", "install it here") from None
        self._writing, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._ping, daemon=True).start()

    def _ping(self) -> None:
        """An empty line now and then. A host that is cut off is not told by sshd that this end is gone."""
        while not self._closed.wait(PING_SECONDS):
            try:
                self._write("\n")
            except (OSError, ValueError):
                return

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with self._writing:
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._lines.put(line.removeprefix(MARK))
        self._lines.put(None)

    def ask(self, question: str, seconds: float, /, **more: Any) -> dict[str, Any]:
        """What the host answers within `seconds`. Raises HostError."""
        try:
            self._write(json.dumps({"question": question, **more}) + "\n")
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise HostError(
                f"no answer within {seconds:.0f} s ({question})",
                "is the host overloaded, or does a file system hang there?",
            ) from None
        except (OSError, ValueError):  # its input is closed: by its end, or by ours
            line = None
        if line is None:
            raise self._ended()
        told = dict(json.loads(line))
        if set(told) == {"error"}:
            raise HostError(told["error"], "")
        return told

    def _ended(self) -> HostError:
        """Why the process is gone, in ssh's words or its own."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            code = -1
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        why = said[-1][:200] if said else f"exit code {code}"
        if code == _SSH_FAILED and self.host is not None:
            return HostError(
                f"ssh does not reach it without a password: {why}",
                f"`ssh -o BatchMode=yes {self.host} true` has to work from here: see to its name, network and keys",
            )
        return HostError(
            f"the checkout or its environment does not start there: {why}",
            f"{self.folder} and {sys.prefix} have to be there too: a shared file system, or `make setup` on that host",
        )

    def close(self) -> None:
        """End the process there: it cleans up when its input ends."""
        self._closed.set()
        try:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(1)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._errors.close()


@contextmanager
def reached(hosts: Iterable[str] | None, ssh_port: int | None) -> Iterator[dict[str, Agent]]:
    """An agent on each host, in this folder; without `hosts` on this one alone. Raises HostError without ssh."""
    agents: dict[str, Agent] = {}
    try:
        for host in hosts or [HERE]:
            agents[host] = Agent(host if hosts else None, Path.cwd(), ssh_port=ssh_port)
        yield agents
    finally:
        threads = [threading.Thread(target=agent.close) for agent in agents.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _ssh(port: int | None) -> list[str]:
    options = ["BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}", "ServerAliveInterval=5", "ServerAliveCountMax=3"]
    words = [word for option in options for word in ("-o", option)]
    return ["ssh", "-T", *words, *(["-p", str(port)] if port else [])]


def _word(words: Sequence[str]) -> str:
    return " ".join(map(shlex.quote, words))


def clock_offset(agent: Agent, tries: int = 5) -> tuple[float, float]:
    """(seconds that the host's clock is ahead of this one, by how much that may be wrong): of the fastest answer."""
    best = (0.0, float("inf"))
    for _ in range(tries):
        before, began = time.time(), time.monotonic()
        told = agent.ask("clock", 2 * CONNECT_SECONDS)["time"]
        took = time.monotonic() - began
        if took / 2 < best[1]:
            best = (told - (before + took / 2), took / 2)
    return best


def ask_all(
    agents: Mapping[str, Agent], question: str, seconds: float, more: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any] | HostError]:
    """The answers of all, at the same time; `more` is what each is told besides."""
    answers: dict[str, dict[str, Any] | HostError] = {}

    def ask(host: str) -> None:
        try:
            answers[host] = agents[host].ask(question, seconds, **more.get(host, {}))
        except HostError as error:
            answers[host] = error

    threads = [threading.Thread(target=ask, args=(host,), daemon=True) for host in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {host: answers[host] for host in agents}
