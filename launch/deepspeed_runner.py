"""The `deepspeed` command for many hosts, for runs that can be asked to stop, and whose hosts can be lost.

    python -m launch.deepspeed_runner [--dry-run] FOLDER [arguments of the deepspeed command, without script]

FOLDER, as one word, is where the launch is written down (pipeline/ranks/handover.py); "-" with --dry-run, which prints
what would be run. DeepSpeed's own runner (0.19.8) builds the command. What differs:

- SIGINT, SIGTERM and SIGUSR1 ask the ranks to stop, by a file that rank 0 looks for; the second ends the launch. (That
  runner kills by pattern on every host, and other runs with it.)
- When this process is killed, pdsh goes with it, and the ranks notice.
- A host that is lost ends the launch: ssh asks whether it is still there. (pdsh would wait for ever.)
- Where pdsh is killed the exit code is not 0.
- mpirun leaves ranks all cores of their host. (By itself it gives each one core, and its data workers the same.)
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # they wait, through imports, until they can be answered

from pipeline.ranks import handover  # noqa: E402
from pipeline.ranks.environment import travelling  # noqa: E402
from pipeline.ranks.lifetime import EXIT_REQUEUE, ask_to_stop, withdraw_stop  # noqa: E402
from pipeline.ranks.log_file import say_at_once  # noqa: E402

# A host that does not answer for 15 s is gone. The user's own come after these, and of a word that is said twice ssh
# takes the first: so these stand behind them.
SSH_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o ConnectTimeout=10"
_PR_SET_PDEATHSIG = 1
_REPEAT_SECONDS = 3.0  # a terminal and a scheduler may both tell


class Launch(subprocess.Popen):
    """What DeepSpeed starts: pdsh or mpirun."""

    the_one: Launch | None = None

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        # A session of its own: a Ctrl-C at the terminal is for this process to answer.
        super().__init__(
            _unbound(command), env=env, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_us
        )
        Launch.the_one = self


def main(arguments: list[str]) -> int:
    """Returns the exit code: the largest of the hosts', as pdsh has it."""
    dry = arguments[0] == "--dry-run"
    word, *options = arguments[dry:]
    folder = None if dry else handover.from_word(word)
    if folder:
        _answer_signals(folder)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # Where mlflow is installed DeepSpeed 0.19.8 imports it, for its autotuner: seconds. Now it seems missing.
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    from deepspeed.launcher import runner  # seconds, in which signals are answered

    # Ranks have these by the handover. Here DeepSpeed would paste some of them into command lines.
    for name in travelling(os.environ):
        if not name.startswith("LD_"):
            os.environ.pop(name)
    os.environ["PDSH_SSH_ARGS_APPEND"] = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_ALIVE}".strip()
    os.environ.setdefault("OMPI_MCA_plm_rsh_args", SSH_ALIVE)
    # Its names in that module alone: one to start, and none to install handlers.
    runner.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": _print if dry else Launch})
    runner.signal = SimpleNamespace(**{**vars(signal), "signal": lambda *_: None})
    command = [*options, "--module", "launch.handed", word]
    if folder is None:
        runner.main(command)
        return 0
    code = 0
    try:
        runner.main(command)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        handover.remove(folder)
        withdraw_stop(handover.run_dir_of(folder), folder.name)
    if Launch.the_one is not None and (Launch.the_one.returncode or 0) < 0:
        code = 128 - Launch.the_one.returncode
    return code


def _answer_signals(folder: Path) -> None:
    run_dir = handover.run_dir_of(folder)
    first: list[float] = []

    def answer(number: int, _: object) -> None:
        name, launch = signal.Signals(number).name, Launch.the_one
        if launch is None:
            handover.remove(folder)
            os._exit(EXIT_REQUEUE)  # nothing has begun
        if not first:
            first.append(time.monotonic())
            try:
                ask_to_stop(run_dir, f"{name} to the launcher", folder.name)
            except OSError as error:
                say_at_once(f"error: {name}: no file can ask the ranks to stop: {error}; once more ends them")
                return
            say_at_once(f"{name}: the ranks are asked to stop, after a checkpoint; once more ends the launch")
        elif time.monotonic() - first[0] > _REPEAT_SECONDS:
            say_at_once(f"{name} once more: the launch ends")
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(launch.pid, signal.SIGTERM)

    for number in _SIGNALS:
        signal.signal(number, answer)


def _unbound(command: list[str]) -> list[str]:
    bound = command[0] == "mpirun" and not {"--bind-to", "-bind-to"} & {*command}
    return ["mpirun", "--bind-to", "none", *command[1:]] if bound else command


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _print(command: list[str], env: dict[str, str]) -> SimpleNamespace:
    words = [f"{name}={shlex.quote(env[name])}" for name in ("PDSH_RCMD_TYPE", "PDSH_SSH_ARGS_APPEND") if name in env]
    print(*(words if command[0] == "pdsh" else []), shlex.join(_unbound(command)), flush=True)
    return SimpleNamespace(wait=lambda: None, returncode=0)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)
