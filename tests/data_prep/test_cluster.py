"""Where work runs: order of completion, errors, and jobs of a real Slurm."""

import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from data_prep.cluster import ClusterError, InProcess, add_cluster_arguments, open_cluster, slurm_cluster
from tests.support.archives import archive, command, digests, run, shard
from tests.support.processes import wait_for
from tests.support.slurm import running_slurm


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


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with running_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


def slurm_options(*settings: str) -> tuple[str, ...]:
    return tuple(word for setting in settings for word in ("--slurm-option", setting))


def test_slurm_jobs_build_the_same_data_set(slurm, tmp_path):
    """Two jobs of one worker each, on a real Slurm; they end with the command."""
    source = archive(tmp_path / "s.tar", count=40)
    options = slurm_options("cores=1", "memory=2GB", "interface=eth0", f"log_directory={tmp_path}", "walltime=00:10:00")
    done = slurm.run(*command(source, tmp_path / "slurm", "--min-side", "8", "--slurm-jobs", "2", *options))
    assert done.returncode == 0, done.stderr
    assert "2 Slurm jobs submitted, for 00:10:00 (walltime=)" in done.stderr
    wait_for(lambda: not slurm.ask("squeue", "--noheader"))
    ended = slurm.ask("squeue", "--noheader", "--states=all", "--format=%j %T").splitlines()
    assert ended == ["dask-worker CANCELLED"] * 2
    wait_for(lambda: not slurm.processes(), told=lambda: "\n".join(slurm.processes()))
    assert run(command(source, tmp_path / "local", "--workers", "1", "--min-side", "8")).returncode == 0
    assert digests(tmp_path / "slurm") == digests(tmp_path / "local")


def test_slurm_jobs_that_come_to_nothing(slurm, tmp_path):
    """Refused by Slurm, or ended before a worker came: one line, where dask-jobqueue would wait for ever."""
    source = archive(tmp_path / "s.tar", count=4)
    for words, more in (
        ("Slurm does not accept such jobs (sbatch: error: invalid partition specified: cpu", ("queue=cpu",)),
        ("all 1 Slurm jobs ended before a worker came from them: slurm-", ("python=/bin/false",)),
    ):
        options = slurm_options("cores=1", "memory=2GB", "interface=eth0", f"log_directory={tmp_path}", *more)
        done = slurm.run(*command(source, tmp_path / "out", "--slurm-jobs", "1", *options))
        assert done.returncode == 1
        assert f"error: {words}" in done.stderr
        assert "Traceback" not in done.stderr


def test_where_there_is_no_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="there is no sbatch here"), open_cluster(parse("--slurm-jobs", "1")):
        pass


def test_shard_says_where_it_fails(tmp_path, capsys):
    assert shard(Path("nowhere.tar"), tmp_path, "--scheduler", "x", "--slurm-jobs", "1") == 1
    assert "nowhere.tar does not exist" in capsys.readouterr().err
