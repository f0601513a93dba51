"""The launch scripts and `make`, for real, up to what a rank finds: its devices, or one line that says what is wrong.

The checkout has our launch/ and Makefile, and a stand-in for `pipeline` that writes down its environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.host import MIGS, OURS, TWO_GPUS, TWO_MIGS, UUIDS, Host
from tests.support.processes import PATIENCE_SECONDS
from tests.support.runs import ROOT

RANK = """
import json, os, sys
if sys.argv[1] == "doctor":
    pass  # all is well
elif "--check" in sys.argv:
    print("checked", *sys.argv[1:], file=sys.stderr)
    if "--hand-over" in sys.argv:
        from pathlib import Path
        from pipeline.ranks import environment, handover
        told = environment.travelling(os.environ)
        print(handover.as_word(handover.write(Path("a run"), sys.argv[1], "a: b", ["--resume", "auto"], told)))
else:
    path = f"rank.{os.environ['RANK']}.json"
    with open(path, "w") as file:
        json.dump({"arguments": sys.argv[1:], **os.environ}, file)
"""


UNDER_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # `make test` hands them on, and a make in it would say so


class Checkout:
    """The folder, and its host."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("bin", "pipeline", "data/demo-22k", "data/demo-1k"):
            (root / name).mkdir(parents=True)
        self.host = Host(root / "bin")
        for name in ("launch", "Makefile", "configs", "pyproject.toml", "constraints.txt"):
            (root / name).symlink_to(ROOT / name)
        (root / "pipeline" / "__init__.py").touch()
        (root / "pipeline" / "ranks").symlink_to(ROOT / "pipeline" / "ranks")
        (root / "pipeline" / "data").symlink_to(ROOT / "pipeline" / "data")
        (root / "pipeline" / "__main__.py").write_text(RANK)
        (root / ".venv").mkdir()
        for name in ("bin", "lib", "pyvenv.cfg"):
            (root / ".venv" / name).symlink_to(Path(sys.prefix) / name)
        (root / ".venv" / ".installed").touch()  # newer than all that make looks at: it installs nothing
        for name in ("demo-22k", "demo-1k"):
            (root / "data" / name / "dataset.json").touch()

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        ours = {
            n: v
            for n, v in os.environ.items()
            if n not in (*OURS, *UNDER_MAKE, "CUDA_VISIBLE_DEVICES", "VENV", "CONFIG")
        }
        return subprocess.run(
            command,
            cwd=self.root,
            env={**ours, "PATH": f"{self.host.folder}:{os.environ['PATH']}", **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def ranks(self, *command: str, **environment: str) -> list[dict[str, str]]:
        """What each rank found in its environment."""
        done = self.run(*command, **environment)
        assert done.returncode == 0, done.stderr
        files = sorted(self.root.glob("rank.*.json"))
        found = [json.loads(file.read_text()) for file in files]
        assert f"--check --ranks {len(found)} --nodes 1" in done.stderr
        for file in files:
            file.unlink()
        return found

    def refused(self, code: int, *command: str, **environment: str) -> str:
        """The one line that it says; nothing was started, nor checked."""
        done = self.run(*command, **environment)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        said = [line for line in done.stderr.splitlines() if not line.startswith("make: *** [")]
        assert len(said) == 1, done.stderr
        return said[0]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


SCRIPTS = ["deepspeed.sh", "torchrun.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_ranks_find_the_gpus_that_were_named_by_uuid(checkout: Checkout, script: str) -> None:
    checkout.host.gpus(TWO_GPUS)
    found = checkout.ranks(
        f"launch/{script}", "pretrain", "CONFIG", "a=b c", CUDA_VISIBLE_DEVICES=f"{UUIDS[1]},{UUIDS[0]}"
    )
    assert [(rank["CUDA_VISIBLE_DEVICES"], rank["LOCAL_RANK"]) for rank in found] == [
        (f"{UUIDS[1]},{UUIDS[0]}", "0"),
        (f"{UUIDS[1]},{UUIDS[0]}", "1"),
    ]
    assert all(rank["arguments"] == ["pretrain", "CONFIG", "a=b c"] for rank in found)
    assert all("DS_ACCELERATOR" not in rank for rank in found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_rank_on_a_mig_device_sees_it_alone(checkout: Checkout, script: str) -> None:
    checkout.host.gpus(TWO_MIGS)
    found = checkout.ranks(f"launch/{script}", "pretrain", "CONFIG")
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in found] == MIGS
    assert {(rank["LOCAL_RANK"], rank["LOCAL_WORLD_SIZE"], rank["WORLD_SIZE"]) for rank in found} == {("0", "2", "2")}
    assert all(rank["arguments"] == ["pretrain", "CONFIG"] for rank in found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_visible_gpu_is_no_gpu(checkout: Checkout, script: str) -> None:
    checkout.host.gpus(TWO_GPUS)
    found = checkout.ranks(f"launch/{script}", "pretrain", "CONFIG", CUDA_VISIBLE_DEVICES="", RANKS="3")
    assert len(found) == 3
    # CUDA ends the list at what is negative: no rank sees a GPU.
    assert all(rank["CUDA_VISIBLE_DEVICES"].startswith("-1") for rank in found)
    assert {rank["DS_ACCELERATOR"] for rank in found} == {"cpu"}


def test_make_starts_the_demo(checkout: Checkout) -> None:
    """On no GPU, on two, and on the one of them that is visible."""
    checkout.host.program("nvidia-smi", "exit 9")
    assert len(checkout.ranks("make", "pretrain")) == 2
    checkout.host.gpus(TWO_GPUS)
    found = checkout.ranks("make", "pretrain")
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in found] == ["0,1", "0,1"]
    found = checkout.ranks("make", "finetune", CUDA_VISIBLE_DEVICES="1")
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in found] == ["1"]


AWKWARD = 'it\'s lr(1e-3) a&b; cost $5 %n "x"'
PDSH = """
case "$*" in *pkill*) exit 1;; esac
while [ "$1" != -w ]; do shift; done
hosts=$2; shift 2; command=$*; node=0
echo "$hosts" >>asked
echo "$command" >>commands
for host in ${hosts//,/ }; do bash -c "${command//%n/$node}" </dev/null & node=$((node + 1)); done
wait
"""


@pytest.mark.parametrize("hosts", [{"node1": 2, "node2": 1}, {"node1": 2}])
def test_hosts_over_ssh(checkout: Checkout, hosts: dict[str, int]) -> None:
    """The real `deepspeed`, with ssh and pdsh that stay here. A single host is reached by them, too."""
    checkout.host.program("ssh", 'case "$*" in *"hostname -I") echo 127.0.0.1;; esac')
    checkout.host.program("pdsh", PDSH)
    (checkout.root / "hosts").write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
    start = ["launch/deepspeed.sh", "pretrain", "CONFIG", f"a={AWKWARD}"]
    done = checkout.run(*start, HOSTFILE="hosts", MLFLOW_TRACKING_PASSWORD=AWKWARD, NCCL_DEBUG="INFO", OTHER="x")
    assert done.returncode == 0, done.stderr
    assert f"a={AWKWARD} --check --ranks {sum(hosts.values())} --nodes {len(hosts)}" in done.stderr
    assert (checkout.root / "asked").read_text() == ",".join(hosts) + "\n"
    found = [json.loads(file.read_text()) for file in sorted(checkout.root.glob("rank.*.json"))]
    assert [rank["WORLD_SIZE"] for rank in found] == [str(sum(hosts.values()))] * sum(hosts.values())
    assert len({rank["arguments"][1] for rank in found}) == 1
    assert found[0]["arguments"][1].startswith(f"{checkout.root}/a run/.launch/")
    for rank in found:
        assert (rank["arguments"][0], rank["arguments"][2:]) == ("pretrain", ["--resume", "auto"])
        assert (rank["MLFLOW_TRACKING_PASSWORD"], rank["NCCL_DEBUG"]) == (AWKWARD, "INFO")
        assert rank["PATH"].startswith(f"{checkout.root}/.venv/bin:")
    assert AWKWARD not in (checkout.root / "commands").read_text()
    assert not (checkout.root / "a run" / ".launch").exists()  # it may hold passwords


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_cannot_be_meant_is_one_line(checkout: Checkout, script: str) -> None:
    checkout.host.gpus(TWO_GPUS)
    start = [f"launch/{script}", "pretrain", "CONFIG"]
    assert "RANKS=8, and this host has 2 GPUs" in checkout.refused(1, *start, RANKS="8")
    assert "MASTER_PORT=abc" in checkout.refused(1, *start, MASTER_PORT="abc")
    assert "names 0 twice" in checkout.refused(1, *start, CUDA_VISIBLE_DEVICES="0,0")
    (checkout.root / "empty" / "bin").mkdir(parents=True)
    assert "empty is not an environment" in checkout.refused(1, *start, VENV="empty")


def test_what_make_cannot_do_is_one_line(checkout: Checkout) -> None:
    for code, said, *words in (
        (2, "RANKS=two: it has to be", "pretrain", "RANKS=two"),
        (2, "CONFIG is empty", "pretrain", "CONFIG="),
        (2, "SOURCE= is for the demo", "finetune", "CONFIG=a", "SOURCE=b"),
        (2, "ONLY=foo: it can be icons or clipart", "data", "ONLY=foo"),
        (2, "VENV=other is for the scripts", "pretrain", "VENV=other"),
        (2, "HOSTFILE=none cannot be read", "pretrain", "HOSTFILE=none"),
    ):
        assert said in checkout.refused(int(code), "make", *map(str, words))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PYTHON": "none-such"}, "none-such is not there"),
        ({"PYTHON": "/bin/ls"}, "/bin/ls is not a Python interpreter"),
        ({"PYTHON": "old"}, "old is Python 3.9, too old"),
        ({"PYTHON": "new"}, "and PYTHON=new is 3.99: rm -r .venv, then again"),
        ({"FFCV": "abc"}, "FFCV=abc: 0 leaves it out"),
        ({"VENV": "other"}, "VENV=other: setup makes .venv here"),
    ],
)
def test_setup_is_told_wrong(checkout: Checkout, environment: dict[str, str], said: str) -> None:
    checkout.host.program("old", "echo 3.9")
    checkout.host.program("new", "echo 3.99")
    assert said in checkout.refused(1, "launch/setup.sh", **environment)


PIP = """
echo 'Collecting tqdm'
echo '  Downloading https://somewhere/whl/torch-2.15.0-cp311.whl (899.8 MB)'
echo 'Downloading tqdm-4.whl (78 kB)'
echo 'Installing collected packages: tqdm, torch'
echo 'ERROR: No space left on device' >&2
exit 1"""


def test_what_takes_long_in_setup_is_said_and_a_pip_that_fails_ends_it(checkout: Checkout) -> None:
    binaries = checkout.root / ".venv" / "bin"
    binaries.unlink()
    binaries.mkdir()
    (binaries / "python").symlink_to(sys.executable)
    (binaries / "pip").write_text(f"#!/bin/bash{PIP}\n")
    (binaries / "pip").chmod(0o755)
    checkout.host.program("apt-get", "exit 1")  # nothing is installed
    done = checkout.run("launch/setup.sh")
    assert done.returncode == 1
    told = [line for line in done.stdout.splitlines() if line.startswith("setup:   ")]
    assert told == ["setup:   torch-2.15.0-cp311.whl (899.8 MB)", "setup:   unpacking them"]
    assert "No space left on device" in done.stderr
    assert "pip could not install the packages above" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", ["deepspeed.sh", "torchrun.sh"])
def test_a_configuration_beside_the_caller(tmp_path: Path, script: str) -> None:
    """Found from another folder than the checkout, with a space in its path."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "own.yaml").write_text("just a text")
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | {"VENV": sys.prefix}
    for at, name, words in (
        (folder, "own.yaml", f"{folder}/own.yaml must hold a mapping of sections, not str"),
        (tmp_path, "a folder/own.yaml", f"{folder}/own.yaml must hold a mapping of sections, not str"),
        (tmp_path, "own.yaml", f"no configuration file own.yaml; in {ROOT}: none"),
    ):
        done = subprocess.run(
            [str(ROOT / "launch" / script), "pretrain", name],
            cwd=at,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert (done.returncode, done.stderr) == (1, f"error: {words}\n")


def test_make_hands_on_paths_with_spaces() -> None:
    for goal, variable, command in (
        ("pretrain", "CONFIG=a b.yaml", 'launch/deepspeed.sh pretrain "a b.yaml"'),
        ("evaluate", "RUN=a b", '-m pipeline evaluate "a b"'),
    ):
        done = subprocess.run(["make", "-n", goal, variable], cwd=ROOT, capture_output=True, text=True, check=True)
        assert command in done.stdout
