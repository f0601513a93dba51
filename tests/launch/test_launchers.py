"""The launch scripts: their exit codes, and their signals as proctrack/cgroup sends them, to a task alone.

What a real Slurm does with slurm.sbatch is in test_slurm.py.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.ranks import handover
from pipeline.ranks.ports import any_free_port
from tests.support.processes import PATIENCE_SECONDS, is_over, wait_for
from tests.support.runs import ROOT

RANK = """
import os, signal, sys, time
if sys.argv[1] == "waits":
    open(f"begun.{os.environ['RANK']}", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR1])
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
        f"exec {sys.executable} {ROOT}/launch/torchrun_agent.py --nproc_per_node ${{RANKS:-1}} "
        f'--master_addr 127.0.0.1 --master_port {any_free_port()} rank.py "$@"',
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


@pytest.mark.parametrize("moment", ["begun", "ready"])
def test_a_job_that_was_asked_to_stop_queues_again(checkout: Path, moment: str) -> None:
    """SIGUSR1 reaches the task alone, which is the agent. It waits in ranks that only import, without a handler yet."""
    (checkout / "slurm-41" / "0").mkdir(parents=True)
    (checkout / "slurm-41" / "0" / ".requeue").write_text("again")  # of an earlier try: does not count
    if moment == "ready":
        (checkout / "go").touch()
    job = sbatch(checkout, "waits", "CONFIG", RANKS="2")
    wait_for(lambda: all((checkout / f"{moment}.{rank}").exists() for rank in (0, 1)), job)
    (task,) = (int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split())
    os.kill(task, signal.SIGUSR1)
    (checkout / "go").touch()
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 0, errors
    assert "Traceback" not in errors
    assert "FAILED" not in errors
    assert asked(checkout) == ["requeue 41"]
    assert (checkout / "told").read_text() == "1 0 node7 20041\n"
    left = ["rank0.err", "rank0.out", "rank1.err", "rank1.out"]
    assert sorted(path.name for path in (checkout / "slurm-41" / "0").iterdir()) == left


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_what_comes_before_the_agent_waits_for_it(checkout: Path, number: int) -> None:
    """While the node checks the configuration, nothing could be asked to stop, and a shell would lose it or die."""
    script = checkout / "launch" / "torchrun.sh"
    waits = "touch checks; until [ -e checked ]; do sleep 0.05; done"
    script.write_text(script.read_text().replace("exec ", f"{waits}\nexec ", 1))
    job = sbatch(checkout, "waits", "CONFIG")
    wait_for((checkout / "checks").exists, job)
    (task,) = (int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split())
    os.kill(task, number)
    (checkout / "go").touch()
    (checkout / "checked").touch()
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert (job.returncode, asked(checkout)) == (0, ["requeue 41"]), errors


def test_scancel_ends_the_script_while_ranks_still_save(checkout: Path) -> None:
    """Slurm's srun leaves at once; an agent that ends later makes no file, and the job is not queued again."""
    (checkout / "bin" / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done; SLURM_NODEID=0 setsid "$@" & echo $! >agent\n'
        "trap 'exit 143' TERM; while :; do sleep 0.05; done\n"
    )
    (checkout / "go").touch()
    job = sbatch(checkout, "waits", "CONFIG")
    wait_for((checkout / "ready.0").exists, job)
    (srun,) = psutil.Process(job.pid).children()
    for process in (job, srun):
        process.send_signal(signal.SIGTERM)
    assert job.wait(PATIENCE_SECONDS) == 143
    agent = psutil.Process(int((checkout / "agent").read_text()))
    agent.send_signal(signal.SIGTERM)
    wait_for(lambda: is_over(agent))
    assert asked(checkout) == []
    assert sorted(path.name for path in (checkout / "slurm-41" / "0").iterdir()) == ["rank0.err", "rank0.out"]


def test_where_slurm_does_not_queue_it_again(checkout: Path) -> None:
    job = sbatch(checkout, "75", "CONFIG", REFUSED="1")
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert (job.returncode, asked(checkout)) == (75, ["requeue 41"])
    assert "submit the same command, it goes on from the checkpoint" in errors


def test_a_job_that_failed_does_not_queue_again(checkout: Path) -> None:
    job = sbatch(checkout, "3", "CONFIG")
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert (job.returncode, asked(checkout)) == (3, []), errors
    assert "FAILED" in errors
    assert "Traceback" not in errors


def test_a_dry_run_says_what_slurm_would_be_asked_for() -> None:
    words = ["pretrain", "CONFIG", "name=a b"]
    script = ROOT / "launch" / "slurm.sbatch"
    done = subprocess.run([str(script), "--dry-run", *words], capture_output=True, text=True, check=True)
    *asked, said, command = done.stdout.splitlines()
    assert [line.strip() for line in asked[1:]] == [
        line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH ")
    ]
    assert said == "and the job runs, on its nodes:"
    assert shlex.split(command)[0] == "srun"
    assert shlex.split(command)[-4:] == ["launch/torchrun.sh", *words]


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "said"),
    [
        (["pretrain"], {}, 2, "no COMMAND and CONFIG"),
        (["--dry-run", "pretrain"], {}, 2, "no COMMAND and CONFIG"),
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


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_the_launcher_of_many_hosts_is_asked_while_it_imports(tmp_path: Path, number: int) -> None:
    """Nothing has begun, and what it was handed may hold passwords."""
    folder = handover.write(tmp_path / "run", "pretrain", "", [], {"AWS_SECRET_ACCESS_KEY": "s"})
    runner = [sys.executable, str(ROOT / "launch" / "deepspeed_runner.py"), handover.as_word(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(runner, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        blocked = Path(f"/proc/{process.pid}/status")
        wait_for(lambda: f"SigBlk:\t{0x4202:016x}" in blocked.read_text(), process)  # INT, USR1, TERM
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, errors) == (75, "")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("script", ["deepspeed.sh", "torchrun.sh", "setup.sh", "slurm.sbatch"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "launch" / script)], check=True)


@pytest.mark.parametrize("script", ["deepspeed.sh", "torchrun.sh"])
def test_what_prints_the_configuration_starts_nothing(script: str) -> None:
    """Nor looks at hosts: none of these is there."""
    done = subprocess.run(
        [str(ROOT / "launch" / script), "pretrain", "configs/demo_pretrain.yaml", "name=a-b", "--print-config"],
        env={**os.environ, "VENV": sys.prefix, "HOSTFILE": "/none", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout)["name"] == "a-b"


@pytest.mark.parametrize("script", ["deepspeed.sh", "torchrun.sh"])
def test_without_arguments_a_script_says_how_it_is_used(script: str) -> None:
    done = subprocess.run([str(ROOT / "launch" / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "The same" in done.stderr
    assert "SIGUSR1" in done.stderr
    assert "set -euo" not in done.stderr
