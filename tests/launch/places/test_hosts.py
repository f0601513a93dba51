"""Hostfiles, as strictly as DeepSpeed and pdsh take them, and the hosts that DEEPSPEED_ARGS choose of one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from deepspeed.launcher import runner

from launch.places.hosts import check_environment_files, chosen, read_options
from launch.places.settings import SettingError
from pipeline.ranks.hostfile import HostfileError, read_hostfile

HOSTS = {"node1": [0, 1], "node2": [0, 1, 2]}


@pytest.mark.parametrize(
    "text",
    [
        "node1 slots=2\nnode2 slots=3\n",
        "node1 slots=2\r\nnode2 slots=3\r\n",
        "# of a rack\n\n  node1\tslots=2   # two\nnode2 slots=3 max_slots=3",
    ],
)
def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(text.encode())
    assert read_hostfile(path) == HOSTS
    assert runner.fetch_hostfile(str(path)) == {"node1": 2, "node2": 3}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1 slots=2\nnode2 lots=2\n", "line 2: 'node2 lots=2' is not 'NAME slots=N'"),
        ("node1\n", "line 1: 'node1' is not"),
        ("slots=2\n", "line 1: 'slots=2' is not"),
        ("node1 slots = 2\n", "line 1: 'node1 slots = 2' is not"),
        ("node1 #slots=2\n", "line 1: 'node1' is not"),
        ("node1 slots=2 slots=3\n", "line 1: 'node1 slots=2 slots=3' is not"),
        ("node1 slots=0\n", "line 1: slots=0 of node1"),
        ("node1 slots=two\n", "line 1: slots=two of node1"),
        ("node1 slots=-2\n", "line 1: slots=-2 of node1"),
        ("node1 slots=2x\n", "line 1: slots=2x of node1"),
        ("node1 slots=2\n# once more\nnode1 slots=2 # again\n", "line 3: node1 stands there for the second time"),
        ("node1,node2 slots=2\n", "line 1: 'node1,node2' is not the name of one host"),
        ("node[1-4] slots=2\n", "line 1: 'node[1-4]' is not the name of one host"),
        ("-v slots=2\n", "line 1: '-v' is not the name of one host"),
        ("\ufeffnode1 slots=2\n", "line 1: '\\ufeffnode1' is not the name of one host"),
        ("", "names no host"),
        ("# nothing\n\n", "names no host"),
    ],
)
def test_what_is_no_hostfile(tmp_path: Path, text: str, said: str) -> None:
    (path := tmp_path / "hosts").write_text(text)
    with pytest.raises(HostfileError) as error:
        read_hostfile(path)
    assert said in str(error.value)
    assert f"HOSTFILE={path}" in str(error.value)
    assert "hostfile.example" in str(error.value)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(HostfileError, match="cannot be read"):
            read_hostfile(path)
    (image := tmp_path / "image").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(HostfileError, match="not a text file"):
        read_hostfile(image)


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ("", HOSTS),
        ("--launcher pdsh --log_level error", HOSTS),
        ("--include node2", {"node2": [0, 1, 2]}),
        ("--include node2:1,0@node1:1", {"node1": [1], "node2": [0, 1]}),
        ("-i node2:2@node2:0", {"node2": [0, 2]}),
        ("--incl=node1", {"node1": [0, 1]}),
        ("--exclude node1", {"node2": [0, 1, 2]}),
        ("-e node1:0,1@node2:1", {"node2": [0, 2]}),
        ("--num_nodes 1", {"node1": [0, 1]}),
        ("--num_gpus 1", {"node1": [0], "node2": [0]}),
        ("--num_nodes=1 --num_accelerators=2", {"node1": [0, 1]}),
    ],
)
def test_the_hosts_that_deepspeed_would_take(arguments: str, left: dict[str, list[int]]) -> None:
    words = shlex.split(arguments)
    assert chosen(HOSTS, read_options(words)) == left
    theirs = runner.parse_args([*words, "script.py"])
    resources = runner.parse_inclusion_exclusion({"node1": 2, "node2": 3}, theirs.include, theirs.exclude)
    assert dict(runner.apply_num_nodes_and_gpus(resources, theirs.num_nodes, theirs.num_gpus)) == left


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--include node3", "names 'node3'"),
        ("--include node1:2", "slot '2' of node1"),
        ("--include node1:", "slot '' of node1"),
        ("--include node1 --exclude node2", "shut each other out"),
        ("--include node1 --num_gpus 1", "shut each other out"),
        ("--exclude node1@node2", "leaves no host"),
        ("--num_nodes 3", "--num_nodes 3, and HOSTFILE has 2 hosts"),
        ("--num_gpus 3", "--num_gpus 3, and HOSTFILE has 2 slots on the smallest host"),
        ("--num_gpus 0", "--num_gpus 0"),
        ("--num_gpus two", "invalid int value: 'two'"),
        ("--num 2", "ambiguous option"),
        ("--hostfile other", "the variable HOSTFILE says that"),
        ("--master_port 1", "the variable MASTER_PORT says that"),
    ],
)
def test_what_deepspeed_args_cannot_choose(arguments: str, said: str) -> None:
    with pytest.raises(SettingError) as error:
        chosen(HOSTS, read_options(shlex.split(arguments)))
    assert said in str(error.value)
    assert str(error.value).startswith("DEEPSPEED_ARGS")


@pytest.mark.parametrize("line", ["", "# a comment", "# a=b", "export A=b", "A", "=b"])
def test_variables_that_deepspeed_would_stumble_over(tmp_path: Path, line: str) -> None:
    path = tmp_path / ".deepspeed_env"
    check_environment_files([tmp_path])
    path.write_text("A=b\nB =c=d e\nC=\n")
    check_environment_files([tmp_path])
    path.write_text(f"A=b\n{line}\nB=c\n")
    with pytest.raises(SettingError, match=r"line 2: .* is not NAME=value"):
        check_environment_files([tmp_path])
