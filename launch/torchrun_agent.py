"""torchrun's agent, for runs that can be asked to stop: its ranks get the signals that it gets, and it ends with the
exit code of the rank that ended first. (torchrun itself dies of SIGUSR1, ends its ranks 30 s after a SIGTERM, and turns
every code into 1 and a traceback.)

    python -m launch.torchrun_agent [torchrun's arguments]

Where REQUEUE_FILE names a file that is there, exit code 75 becomes 0 and a mark in it (launch/slurm.sbatch says why).
Where RANK_LOGS names a folder, what a rank says is in its files there, rank3.out and rank3.err, and on the console
after "3: ".
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from pipeline.ranks.lifetime import EXIT_REQUEUE

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOOK_SECONDS = 0.1
_asked: set[int] = set()  # those of them that the ranks were sent


class RankLogs(LogsSpecs):
    """Files by the number of a rank among all, where torchrun's own are by a random name and the number on its host."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def root_log_dir(self) -> str:
        return str(self._root_log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """envs: of each rank of this host, by its number on it."""
        out, err = (
            {local: f"{self.root_log_dir}/rank{env['RANK']}.{end}" for local, env in envs.items()}
            for end in ("out", "err")
        )
        return LogsDest(out, err, out, err, dict.fromkeys(envs, os.devnull))


def main() -> int:
    """Returns the exit code: of the rank that failed first, as a shell would say it, else 0."""
    # Blocked in here, and so in the ranks until they can answer: one that still imports would die of it, and the ranks
    # of other hosts wait for it. That there are handlers tells hold_signals.py to pass on what came before.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_pass_on, daemon=True).start()
    try:
        _start(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])  # not SIGTERM
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if -code in _asked:
            code = EXIT_REQUEUE  # before it was a rank: nothing is lost
        if code != EXIT_REQUEUE:
            print(error, file=sys.stderr, flush=True)  # names rank and host
        return _requeue() if code == EXIT_REQUEUE else code if code >= 0 else 128 - code
    return 0


def _start(arguments: list[str]) -> None:
    """Start the ranks, and wait for their end. Raises ChildFailedError."""
    if folder := os.environ.get("RANK_LOGS"):
        config, command, words = run.config_from_args(run.parse_args(arguments))
        config.logs_specs, config.log_line_prefix_template = RankLogs(Path(folder)), "${rank}: "
        elastic_launch(config, command)(*words)
    else:
        run.main(["--log-dir", os.devnull, *arguments])  # else each run leaves an empty folder in /tmp


def _requeue() -> int:
    """The exit code of a run that is to be queued again."""
    if file := os.environ.get("REQUEUE_FILE"):
        with suppress(OSError), open(file, "r+", encoding="utf-8") as mark:
            mark.write("again\n")
            return 0
    return EXIT_REQUEUE


def _pass_on() -> None:
    """To the ranks: Slurm (proctrack/cgroup) signals a task alone, which is this process, and none that it started."""
    while True:
        number = signal.sigwait(_SIGNALS)
        several = "--nnodes" in sys.argv and sys.argv[sys.argv.index("--nnodes") + 1] != "1"
        while not (ranks := psutil.Process().children()):  # on several hosts it is they who tell the others
            if not several or signal.sigtimedwait(_SIGNALS, _LOOK_SECONDS):
                os._exit(_requeue())  # nothing has begun
        _asked.add(number)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
