"""The launch scripts: their exit codes, their signals, and what Slurm is asked for."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import PATIENCE_SECONDS, wait_for
from tests.support.runs import ROOT

RANK = """
import os, signal, sys, time
if sys.argv[1] == "waits":
    open(f"begun.{os.environ['RANK']}", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    open(f"ready.{os.environ['RANK']}", "w").close()
    time.sleep(1000)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Slurm's commands, a launch/ whose torchrun.sh starts the real agent on RANK, and the real rest of launch/."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "pipeline").symlink_to(ROOT / "pipeline")
    (tmp_path / "rank.py").write_text(RANK)
    for name, text in {
        "bin/srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=0 exec "$@"',
        "bin/scontrol": 'if [ "$1" = show ]; then echo node7; else echo "$@" >>asked; exit ${REFUSED:-0}; fi',
        "launch/torchrun.sh": 'trap "" USR1; echo "$NODES $NODE_RANK $MASTER_ADDR $MASTER_PORT" >told\n'
        f"exec {sys.executable} {ROOT}/launch/torchrun_agent.py --standalone --nproc_per_node ${{RANKS:-1}} "
        'rank.py "$@"',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    return tmp_path


def sbatch(checkout: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The job script, with what it hands to a rank: a word that RANK understands, and one that it does not look at."""
    slurm = {"SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_ID": "41"}
    slurm |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node7"}
    path = f"{checkout / 'bin'}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(checkout / "launch" / "slurm.sbatch"), *arguments],
        env={**os.environ, "VENV": sys.prefix, **slurm, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def asked(checkout: Path) -> list[str]:
    """What Slurm was asked for, beside names."""
    return (checkout / "asked").read_text().splitlines() if (checkout / "asked").exists() else []


def pending(pid: int, number: int) -> bool:
    """Whether a process has yet to take a signal that it was sent."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def test_a_job_that_was_asked_to_stop_queues_again(checkout: Path) -> None:
    """SIGUSR1 reaches the task alone, which is the agent; both ranks get it from there, once they have a handler."""
    (checkout / "slurm-41.requeue").touch()  # of an earlier try: does not count
    job = sbatch(checkout, "waits", "CONFIG", RANKS="2")
    wait_for(lambda: all((checkout / f"begun.{rank}").exists() for rank in (0, 1)), job)
    (task,) = (int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split())
    os.kill(task, signal.SIGUSR1)
    wait_for(lambda: not pending(task, signal.SIGUSR1), job)
    (checkout / "go").touch()
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 0, errors
    assert "Traceback" not in errors
    assert "FAILED" not in errors
    assert asked(checkout) == ["requeue 41"]
    assert (checkout / "told").read_text() == "1 0 node7 20041\n"
    assert not (checkout / "slurm-41.requeue").exists()


def test_where_slurm_does_not_queue_it_again(checkout: Path) -> None:
    job = sbatch(checkout, "75", "CONFIG", REFUSED="1")
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert (job.returncode, asked(checkout)) == (75, ["requeue 41"])
    assert "submit the same command, it goes on from the checkpoint" in errors


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_that_ended_does_not_queue_again(checkout: Path, code: int) -> None:
    job = sbatch(checkout, str(code), "CONFIG")
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert (job.returncode, asked(checkout)) == (code, []), errors
    assert ("FAILED" in errors) == (code == 3)
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "said"),
    [
        (["pretrain"], {}, 2, "no COMMAND and CONFIG"),
        (["pretrain", "CONFIG"], {"SLURM_SUBMIT_DIR": ""}, 2, "this script is for sbatch"),
        (["pretrain", "CONFIG"], {"SLURM_SUBMIT_DIR": "/"}, 1, "/ is not the checkout"),
        (["pretrain", "CONFIG"], {"VENV": "none"}, 1, "none is not an environment"),
        (["pretrain", "CONFIG"], {"SLURM_JOB_ID": ""}, 1, "submit it with sbatch"),
        (["pretrain", "CONFIG"], {"RANKS": "two"}, 1, "RANKS=two"),
    ],
)
def test_a_job_that_cannot_begin(
    checkout: Path, arguments: list[str], environment: dict[str, str], code: int, said: str
) -> None:
    job = sbatch(checkout, *arguments, **environment)
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    (line,) = errors.splitlines()
    assert (job.returncode, line.startswith("error: ")) == (code, True)
    assert said in line
    assert not (checkout / "told").exists()


def test_sigterm_to_the_agent_is_the_ranks_to_answer(checkout: Path) -> None:
    (checkout / "go").touch()
    agent = [sys.executable, str(ROOT / "launch" / "torchrun_agent.py"), "--standalone", "rank.py", "waits"]
    with subprocess.Popen(agent, cwd=checkout, stderr=subprocess.DEVNULL) as process:
        wait_for((checkout / "ready.0").exists, process)
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 75


@pytest.mark.parametrize("script", ["deepspeed.sh", "torchrun.sh", "setup.sh", "slurm.sbatch"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "launch" / script)], check=True)


@pytest.mark.parametrize("script", ["deepspeed.sh", "torchrun.sh"])
def test_without_arguments_a_script_says_how_it_is_used(script: str) -> None:
    done = subprocess.run([str(ROOT / "launch" / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "The same" in done.stderr
    assert "SIGUSR1" in done.stderr
    assert "set -euo" not in done.stderr
