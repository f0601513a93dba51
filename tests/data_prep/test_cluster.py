"""Where work runs: order of completion, errors, and Slurm through a stand-in for sbatch that starts jobs here."""

import os
import stat
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from data_prep.cluster import ClusterError, InProcess, add_cluster_arguments, open_cluster, slurm_cluster
from tests.support.archives import archive, command, digests, run, shard

SBATCH = """#!/bin/sh
# Starts the job script at once, as Slurm would when a node is free.
cp "$1" "$STAND_IN/script"
setsid /bin/bash "$STAND_IN/script" >"$STAND_IN/job.log" 2>&1 </dev/null &
echo $! >"$STAND_IN/pid"
echo "Submitted batch job 7"
"""
SCANCEL = """#!/bin/sh
echo "$@" >"$STAND_IN/cancelled"
kill -- -"$(cat "$STAND_IN/pid")" 2>/dev/null
exit 0
"""


def parse(*options: str):
    parser = ArgumentParser()
    add_cluster_arguments(parser)
    return parser.parse_args(options)


def reciprocal(x: int) -> float:
    return 1 / x


def test_in_process_and_dask_give_the_same_and_raise_the_same():
    with open_cluster(parse("--workers", "1")) as cluster:
        assert isinstance(cluster, InProcess)
        assert dict(cluster.run(reciprocal, range(1, 5))) == {x: 1 / x for x in range(1, 5)}
    taken = []

    def tasks():
        for x in range(1, 40):
            taken.append(x)
            yield x

    with open_cluster(parse("--workers", "2")) as cluster:
        for done, (x, result) in enumerate(cluster.run(reciprocal, tasks()), start=1):
            assert result == 1 / x
            assert len(taken) <= done + 4  # tasks are made as they are needed, not before
        with pytest.raises(ZeroDivisionError):
            list(cluster.run(reciprocal, [1, 0]))
    assert len(taken) == 39


def test_options_that_exclude_each_other_and_bad_slurm_options():
    with (
        pytest.raises(ClusterError, match="exclude each other"),
        open_cluster(parse("--scheduler", "x", "--slurm-jobs", "1")),
    ):
        pass
    with pytest.raises(ClusterError, match="not KEY=VALUE"):
        slurm_cluster(["cores"])
    with pytest.raises(ClusterError, match="--slurm-option"):
        slurm_cluster(["cores=2"])  # no memory


def test_slurm_job_script():
    with slurm_cluster(["cores=16", "memory=64GB", "queue=cpu", "walltime=08:00:00", "account=vision"]) as cluster:
        script = cluster.job_script()
    for line in ("#SBATCH -p cpu", "#SBATCH -A vision", "#SBATCH --cpus-per-task=16", "#SBATCH -t 08:00:00"):
        assert line in script.splitlines()
    assert f"{sys.executable} -m distributed.cli.dask_worker" in script
    assert "--nthreads 1 " in script
    assert "--nworkers 16 " in script


def test_slurm_jobs_build_the_same_data_set(tmp_path):
    stand_in = tmp_path / "bin"
    stand_in.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (stand_in / name).write_text(text)
        (stand_in / name).chmod(stat.S_IRWXU)
    source = archive(tmp_path / "s.tar", count=40)
    options = ("--min-side", "8", "--slurm-jobs", "1", "--slurm-option", "cores=2", "--slurm-option", "memory=4GB")
    options += ("--slurm-option", "interface=lo", "--slurm-option", f"log_directory={tmp_path}")
    environment = {"PATH": f"{stand_in}:{os.environ['PATH']}", "STAND_IN": str(tmp_path)}
    done = run(command(source, tmp_path / "slurm", *options), **environment)
    assert done.returncode == 0, done.stderr + (tmp_path / "job.log").read_text()
    assert "7" in (tmp_path / "cancelled").read_text()
    assert run(command(source, tmp_path / "local", "--workers", "1", "--min-side", "8")).returncode == 0
    assert digests(tmp_path / "slurm") == digests(tmp_path / "local")


def test_shard_says_where_it_fails(tmp_path, capsys):
    assert shard(Path("nowhere.tar"), tmp_path, "--scheduler", "x", "--slurm-jobs", "1") == 1
    assert "nowhere.tar does not exist" in capsys.readouterr().err
