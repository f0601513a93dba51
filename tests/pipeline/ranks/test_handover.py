"""What a launch on several hosts hands to its ranks, and which variables are among it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from launch.handed import rank_environment
from pipeline.ranks import handover
from pipeline.ranks.environment import travelling
from pipeline.ranks.handover import HandoverError


def test_handed_over_for_the_owner_alone_and_removed(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs of mine" / "a"
    environment = {"MLFLOW_TRACKING_PASSWORD": 'it\'s $5 & "more"\n'}
    folder = handover.write(run_dir, "pretrain", "name: a\n", ["--resume", "never"], environment)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    word = handover.as_word(folder)
    assert word.replace("=", "").replace("-", "").replace("_", "").isalnum()
    assert handover.from_word(word) == folder
    assert handover.run_dir_of(folder) == run_dir
    found = handover.read(folder)
    assert found.arguments == ["pretrain", f"{folder}/config.yaml", "--resume", "never"]
    assert Path(found.arguments[1]).read_text() == "name: a\n"
    assert found.environment == {**environment, handover.VARIABLE: str(folder)}
    handover.remove(folder)
    assert list(run_dir.iterdir()) == []


def test_of_launches_that_were_killed_the_old_are_removed(tmp_path: Path) -> None:
    old, recent = (handover.write(tmp_path, "pretrain", "", [], {}) for _ in range(2))
    os.utime(old, (0, 0))
    new = handover.write(tmp_path, "pretrain", "", [], {})
    assert {path for path in (old, recent, new) if path.exists()} == {recent, new}


def test_a_host_that_does_not_see_it(tmp_path: Path) -> None:
    with pytest.raises(HandoverError, match=f"{os.uname().nodename} does not see .*all hosts share"):
        handover.read(tmp_path / "a", seconds=0.6)
    (tmp_path / "launch.json").write_text("{")
    with pytest.raises(HandoverError, match="cannot read"):
        handover.read(tmp_path)


def test_which_variables_travel() -> None:
    environment = {
        "PIPELINE_KERNELS": "0",
        "OMP_NUM_THREADS": "4",
        "AWS_SECRET_ACCESS_KEY": "s",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_DEBUG": "INFO",
        "https_proxy": "p",
        "MLFLOW_TRACKING_TOKEN": "t",
        "FI_PROVIDER": "efa",
    }
    own = {"CUDA_VISIBLE_DEVICES": "0", "HOME": "/root", "PATH": "/bin", "RANK": "3", "HOSTNAME": "a", "MY_TOKEN": "m"}
    assert travelling({**environment, **own}) == environment
    more = {**own, "PIPELINE_ENVIRONMENT": "MY_*, CUDA_VISIBLE_DEVICES"}
    assert travelling(more) == {"MY_TOKEN": "m"}


def test_a_rank_under_mpirun() -> None:
    own = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "PATH": "/bin"}
    own |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    found = rank_environment(own, {"PIPELINE_MASTER": "node1:29500", "A": "b"})
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "A": "b"}
    expected |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert expected.items() <= found.items()
    assert found["PATH"].endswith("bin:/bin")
    # DeepSpeed's launcher has said it itself.
    assert "MASTER_ADDR" not in rank_environment({"RANK": "0"}, {"PIPELINE_MASTER": "node1:29500"})
