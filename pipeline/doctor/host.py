"""What one host tells, to `reach.Agent`: questions come in by stdin, a line of JSON each, answers go out by stdout.

    python -m pipeline.doctor.host

`look` is one question for all that a host can tell by itself. What cannot be told is an {"error": ...} in its place.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

MARK = "doctor: "  # as in reach.py, which a host has no need to import
_SILENT_SECONDS = 60.0  # without a sign of life of who asks


class _Host:
    """The answers to each question, by name."""

    def __init__(self) -> None:
        self._nonces: Any = None
        self._ranks: list[subprocess.Popen[str]] = []

    def clock(self) -> dict[str, Any]:
        return {"time": time.time()}

    def look(
        self,
        config: dict[str, Any],
        environment: dict[str, str],
        hosts: list[str],
        is_first: bool,
        port: int | None,
        fast: bool,
    ) -> dict[str, Any]:
        # What the ranks of a run are given too; what stands in this host's own environment they have as well.
        os.environ.update(environment)
        from pipeline.config.kinds import validated
        from pipeline.doctor import data, disks, gpus, names, network, settings, software

        read = validated(config)
        told: dict[str, Any] = {
            "software": _told(software.look),
            "gpus": _told(gpus.look),
            "names": _told(lambda: names.look(hosts, port)),
            "data": _told(lambda: data.look(read, is_first, fast)),
            "links": _told(network.look),
        }
        classes = None if fast else told["data"].get("classes")
        told["disks"] = _told(lambda: disks.look(read, is_first, classes))
        if is_first:
            told["mlflow"] = _told(lambda: settings.look_mlflow(read))
        return told

    def write(self, folder: str, nonce: str) -> dict[str, Any]:
        from pipeline.doctor.disks import Nonces

        self._nonces = Nonces()
        return {"fault": self._nonces.write(folder, nonce)}

    def unseen(self, folder: str, nonces: list[str]) -> dict[str, Any]:
        return {"unseen": self._nonces.unseen(folder, nonces)}

    def remove(self) -> dict[str, Any]:
        if self._nonces is not None:
            self._nonces.remove()
        return {}

    def leave(self) -> NoReturn:
        """Clean up and end this process, whatever it is at: who asks is done, or gone."""
        for rank in self._ranks:
            rank.kill()
        self.remove()
        os._exit(0)

    def reduce(self, **how: Any) -> dict[str, Any]:
        from pipeline.doctor.network import run_ranks

        return run_ranks(self._ranks, **how)


def _told(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return look()
    except Exception as error:  # of a store, a driver, a file system: it is one finding, and the others go on
        return {"error": " ".join(str(error).split())[:500] or type(error).__name__}


def _import() -> None:
    """What `look` needs, while the clocks are compared and the configuration is read."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    import pipeline.config.kinds
    import pipeline.doctor.data
    import pipeline.doctor.disks  # noqa: F401


def main() -> None:
    """Answer until the input ends, or nothing comes any more: a network that is cut ends no input."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    host, lines = _Host(), queue.Queue[str]()

    heard = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            heard.set()
            if line.strip():
                lines.put(line)
        host.leave()

    def leave_when_alone() -> None:
        while heard.wait(_SILENT_SECONDS):
            heard.clear()
        host.leave()

    threading.Thread(target=read, daemon=True).start()
    threading.Thread(target=leave_when_alone, daemon=True).start()
    threading.Thread(target=_import, daemon=True).start()
    while True:
        asked = json.loads(lines.get())
        answer = _told(partial(getattr(host, asked.pop("question")), **asked))
        out.write(f"{MARK}{json.dumps(answer)}\n")
        out.flush()


if __name__ == "__main__":
    main()
