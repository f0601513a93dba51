"""What each launcher is told, from the environment, and what is refused: a table each. nvidia-smi is a stand-in."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.host import MIGS, TWO_GPUS, TWO_MIGS, UUIDS, Host
from tests.support.runs import ROOT


@pytest.fixture
def host(tmp_path: Path) -> Host:
    (folder := tmp_path / "bin").mkdir()
    return Host(folder)


def world(told: dict[str, str]) -> list[int | str]:
    """What DeepSpeed's launcher is told of this host."""
    words = told["launch"].split()
    return json.loads(base64.urlsafe_b64decode(words[words.index("--world_info") + 1]))["localhost"]


@pytest.mark.parametrize(
    ("listing", "environment", "ids", "module"),
    [
        (None, {}, [-1, -1], "pipeline"),
        (None, {"RANKS": "3"}, [-1, -1, -1], "pipeline"),
        (TWO_GPUS, {}, [0, 1], "pipeline"),
        (TWO_GPUS, {"RANKS": "1"}, [0], "pipeline"),
        (TWO_GPUS, {"RANKS": "2"}, [0, 1], "pipeline"),
        (TWO_GPUS, {"RANKS": ""}, [0, 1], "pipeline"),
        (TWO_GPUS, {"CUDA_VISIBLE_DEVICES": "1"}, [1], "pipeline"),
        (TWO_GPUS, {"CUDA_VISIBLE_DEVICES": "1,0", "RANKS": "1"}, [1], "pipeline"),
        (TWO_GPUS, {"CUDA_VISIBLE_DEVICES": "GPU-b,GPU-a"}, UUIDS[::-1], "pipeline"),
        (TWO_GPUS, {"CUDA_VISIBLE_DEVICES": ""}, [-1, -1], "pipeline"),
        (TWO_GPUS, {"CUDA_VISIBLE_DEVICES": "-1", "RANKS": "4"}, [-1] * 4, "pipeline"),
        (TWO_MIGS, {}, MIGS, "launch.places.one_device pipeline"),
        (TWO_MIGS, {"CUDA_VISIBLE_DEVICES": MIGS[1]}, MIGS[1:], "launch.places.one_device pipeline"),
    ],
)
def test_ranks_of_one_host(
    host: Host, listing: str | None, environment: dict[str, str], ids: list[int | str], module: str
) -> None:
    if listing:
        host.gpus(listing)
    told = host.told("deepspeed", **environment)
    assert (told["ranks"], told["nodes"], world(told)) == (str(len(ids)), "1", ids)
    assert told["module"] == module
    on_cpu = ids[0] == -1
    assert told.get("DS_ACCELERATOR") == ("cpu" if on_cpu else None)
    visible = "-1" if on_cpu else ",".join(map(str, ids))
    assert told["CUDA_VISIBLE_DEVICES"] == visible
    again = host.told("torchrun", **environment)
    assert again["launch"] == f"--nnodes 1 --nproc_per_node {len(ids)} --standalone"
    for name in ("ranks", "nodes", "module", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        assert again.get(name) == told.get(name), name


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "demo"])
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANKS": "8"}, "RANKS=8, and this host has 2 GPUs"),
        ({"RANKS": "2", "CUDA_VISIBLE_DEVICES": "1"}, "RANKS=2, and CUDA_VISIBLE_DEVICES=1 shows 1 GPU:"),
        ({"RANKS": "two"}, "RANKS=two: it has to be a whole number, 1 or more"),
        ({"RANKS": "0"}, "RANKS=0: it has"),
        ({"RANKS": "-1"}, "RANKS=-1: it has"),
        ({"RANKS": "1.5"}, "RANKS=1.5: it has"),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, "CUDA_VISIBLE_DEVICES has 2, and this host has 2 GPUs"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-c"}, "CUDA_VISIBLE_DEVICES has GPU-c, which no device"),
    ],
)
def test_ranks_that_cannot_be(host: Host, launcher: str, environment: dict[str, str], said: str) -> None:
    host.gpus(TWO_GPUS)
    assert said in host.refused(launcher, **environment)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, ""),
        ({"RANKS": "1"}, "note: RANKS=1, and this host has 2 GPUs: the run has 0\n"),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, "note: CUDA_VISIBLE_DEVICES=0,-1,1 ends at -1, as CUDA reads it: 1 GPU\n"),
        (
            {"CUDA_VISIBLE_DEVICES": ""},
            "note: CUDA_VISIBLE_DEVICES= shows none of the GPUs of this host: the ranks run on the CPU\n",
        ),
    ],
)
def test_what_may_surprise_is_said(host: Host, environment: dict[str, str], said: str) -> None:
    host.gpus(TWO_GPUS)
    for launcher in ("deepspeed", "torchrun"):
        assert host.places(launcher, **environment).stderr == said
    assert host.places("demo", **environment).stderr == ""  # the launcher will say it


def test_a_driver_that_is_out_of_order_is_named(host: Host) -> None:
    host.program("nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    done = host.places("deepspeed")
    assert done.returncode == 0
    assert (
        done.stderr == "note: no GPU is used: nvidia-smi: Failed to initialize NVML: Driver/library version mismatch\n"
    )
    assert "version mismatch" in host.refused("deepspeed", CUDA_VISIBLE_DEVICES="0")


@pytest.mark.parametrize(
    ("listing", "environment", "ranks"),
    [
        (None, {}, "2"),
        (None, {"RANKS": "3"}, "3"),
        (TWO_GPUS.splitlines(True)[0], {}, "1"),
        (TWO_GPUS, {}, "2"),
        (TWO_GPUS + TWO_GPUS.replace("a", "c").replace("b", "d"), {}, "2"),
        (TWO_GPUS, {"CUDA_VISIBLE_DEVICES": "1"}, "1"),
        (TWO_GPUS, {"CUDA_VISIBLE_DEVICES": ""}, "2"),
        (TWO_GPUS, {"RANKS": "1"}, "1"),
        (TWO_GPUS, {"HOSTFILE": "launch/hostfile.example"}, None),
    ],
)
def test_ranks_of_the_demo(host: Host, listing: str | None, environment: dict[str, str], ranks: str | None) -> None:
    if listing:
        host.gpus(listing)
    assert host.told("demo", **environment).get("RANKS") == ranks


def test_the_hosts_of_a_hostfile(host: Host, tmp_path: Path) -> None:
    (hosts := tmp_path / "hosts").write_text("node1 slots=2\r\nnode2 slots=1\r\n")
    host.program("pdsh", "exit 1")
    host.program("ssh", '[ "${@: -2:1}" != down ] || { echo "ssh: no route to host" >&2; exit 255; }')
    told = host.told("deepspeed", HOSTFILE=str(hosts))
    assert (told["ranks"], told["nodes"], told["launch"]) == ("3", "2", f"--hostfile {hosts} --force_multi")
    assert (told["PIPELINE_HOSTS"], told["PIPELINE_MASTER"]) == ("node1:2 node2:1", "node1:29500")
    assert "CUDA_VISIBLE_DEVICES" not in told
    told = host.told("deepspeed", HOSTFILE=str(hosts), MASTER_PORT="29501", DEEPSPEED_ARGS="-e 'node1:1'")
    assert (told["ranks"], told["nodes"]) == ("2", "2")
    assert told["launch"] == f"--hostfile {hosts} --master_port 29501 -e node1:1 --force_multi"
    done = host.places("deepspeed", HOSTFILE=str(hosts), CUDA_VISIBLE_DEVICES="0")
    assert done.stderr == "note: CUDA_VISIBLE_DEVICES does not count with HOSTFILE: slots= does\n"
    # A single host: DeepSpeed would start its ranks here, wherever it is.
    hosts.write_text("node1 slots=2\n")
    assert host.told("deepspeed", HOSTFILE=str(hosts))["launch"] == f"--hostfile {hosts} --force_multi"
    hosts.write_text("node1 slots=2\ndown slots=2\n")
    said = host.refused("deepspeed", HOSTFILE=str(hosts))
    assert "ssh does not reach down without a password: ssh: no route to host" in said


def test_what_is_missing_for_a_hostfile(host: Host, tmp_path: Path) -> None:
    (hosts := tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=1\n")
    assert "pdsh is not installed" in host.refused("deepspeed", HOSTFILE=str(hosts))
    assert "ssh is not installed" in host.refused("deepspeed", HOSTFILE=str(hosts), DEEPSPEED_ARGS="--launcher openmpi")
    for launcher in ("deepspeed", "demo"):
        assert "RANKS=4 beside HOSTFILE=" in host.refused(launcher, HOSTFILE=str(hosts), RANKS="4")
    assert "names 'node3'" in host.refused("deepspeed", HOSTFILE=str(hosts), DEEPSPEED_ARGS="--include node3")
    assert "MASTER_PORT=abc" in host.refused("deepspeed", HOSTFILE=str(hosts), MASTER_PORT="abc")
    assert "line 2: 'node2 lots=1'" in _with(host, hosts, "node1 slots=2\nnode2 lots=1\n")
    assert "names no host" in _with(host, hosts, "")


def _with(host: Host, hosts: Path, text: str) -> str:
    hosts.write_text(text)
    return host.refused("deepspeed", HOSTFILE=str(hosts))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--num_gpus 4", "--num_gpus is not for one host"),
        ("--include localhost:0", "--include is not for one host"),
        ("--incl=localhost:0", "--incl is not for one host"),
        ("-i localhost:0", "-i is not for one host"),
        ("--master_port 1", "--master_port is not for one host"),
        ("-q other.py", "other.py is not for one host"),
        ("--log_level", "--log_level wants a value"),
        ("--launcher_args 'x", "No closing quotation"),
    ],
)
def test_arguments_that_are_not_for_one_host(host: Host, arguments: str, said: str) -> None:
    assert said in host.refused("deepspeed", DEEPSPEED_ARGS=arguments)


def test_arguments_for_one_host(host: Host) -> None:
    told = host.told("deepspeed", DEEPSPEED_ARGS="-q --log_level=error --enable_each_rank_log 'a folder'")
    assert told["launch"].endswith(" -q --log_level=error --enable_each_rank_log a folder")


def test_torchrun_on_several_hosts(host: Host) -> None:
    host.gpus(TWO_GPUS)
    four = {"NODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "host0"}
    told = host.told("torchrun", **four)
    assert (told["ranks"], told["nodes"]) == ("8", "4")
    several = "--nnodes 4 --nproc_per_node 2 --node_rank 3 --master_addr host0 --master_port"
    assert told["launch"] == f"{several} 29500 --rdzv_conf timeout=300"
    told = host.told("torchrun", **four, MASTER_PORT="29501", RENDEZVOUS_SECONDS="900")
    assert told["launch"] == f"{several} 29501 --rdzv_conf timeout=900"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"NODES": "two"}, "NODES=two: it has to be a whole number, 1 or more"),
        ({"NODES": "0"}, "NODES=0"),
        ({"NODES": "2", "MASTER_ADDR": "host0"}, "NODE_RANK is not set: which of the NODES=2 hosts is this, 0 to 1?"),
        ({"NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "host0"}, "NODE_RANK is 2"),
        ({"NODES": "2", "NODE_RANK": "-1", "MASTER_ADDR": "host0"}, "NODE_RANK=-1: it has to be a whole number, 0 or"),
        ({"NODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR="),
        ({"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "host0 host1"}, "MASTER_ADDR=host0 host1"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1, and NODES is not set"),
        ({"RENDEZVOUS_SECONDS": "soon"}, "RENDEZVOUS_SECONDS=soon: it has to be a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: a port is a number from 1 to 65535"),
        ({"HOSTFILE": "hosts"}, "HOSTFILE=hosts is for launch/deepspeed.sh"),
        ({"DEEPSPEED_ARGS": "-q"}, "DEEPSPEED_ARGS=-q is for launch/deepspeed.sh"),
    ],
)
def test_torchrun_is_told_wrong(host: Host, environment: dict[str, str], said: str) -> None:
    assert said in host.refused("torchrun", **environment)


def test_a_port_in_use(host: Host) -> None:
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        said = f"MASTER_PORT={port}: the port is in use on this host"
        assert said in host.refused("deepspeed", MASTER_PORT=port)
        assert said in host.refused("torchrun", MASTER_PORT=port)
        several = {"NODES": "2", "MASTER_ADDR": "host0", "MASTER_PORT": port}
        assert said in host.refused("torchrun", **several, NODE_RANK="0")
        host.told("torchrun", **several, NODE_RANK="1")  # another host listens
    assert f"--master_port {port}" in host.told("deepspeed", MASTER_PORT=port)["launch"]
    assert f"--master_addr 127.0.0.1 --master_port {port}" in host.told("torchrun", MASTER_PORT=port)["launch"]
    assert "NODES=2 is for launch/torchrun.sh" in host.refused("deepspeed", NODES="2")


def test_slurm(host: Host) -> None:
    host.program("scontrol", '[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"')
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "20041", "SLURM_JOB_NODELIST": "node[7-8]"}
    told = host.told("slurm", **job)
    assert told == {"NODES": "2", "MASTER_ADDR": "node7", "MASTER_PORT": "20041"}
    told = host.told("slurm", **job, SLURM_CPUS_PER_TASK="96", MASTER_PORT="29501")
    assert (told["SRUN_CPUS_PER_TASK"], told["MASTER_PORT"]) == ("96", "29501")
    for name in job:
        assert "submit it with sbatch" in host.refused("slurm", **{**job, name: ""})
    assert "SLURM_JOB_ID=x" in host.refused("slurm", **{**job, "SLURM_JOB_ID": "x"})
    assert "RANKS=two" in host.refused("slurm", **job, RANKS="two")
    assert "RENDEZVOUS_SECONDS=soon" in host.refused("slurm", **job, RENDEZVOUS_SECONDS="soon")
    said = host.refused("slurm", **{**job, "SLURM_JOB_NODELIST": "node9"})
    assert "scontrol does not name the nodes of SLURM_JOB_NODELIST=node9: exit code 1" in said
    (host.folder / "scontrol").unlink()
    assert "scontrol, which knows the nodes" in host.refused("slurm", **job)


def test_it_starts_fast() -> None:
    """Every start waits for it: nothing that takes time is imported."""
    script = "import launch.places.__main__, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {"launch", "pipeline", "__main__", "sitecustomize", "distutils-precedence"}
    foreign = set(done.stdout.split()) - set(sys.stdlib_module_names) - ours
    assert not {name for name in foreign if not name.startswith(("_", "__editable__"))}
