"""Writing checkpoints while training goes on: whole or not at all, on full disks, under SIGKILL; links, retention."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoints import state as checkpoint
from pipeline.checkpoints.files import locate, read_meta, verify
from pipeline.checkpoints.state import CheckpointWriter, read_optimizer, read_tensors
from pipeline.config.sections import Checkpoint
from tests.support.checkpoints import SYNSETS, TinyEngine, meta_at
from tests.support.processes import PATIENCE_SECONDS
from tests.support.runs import ROOT

MB = 2**20


def save(writer: CheckpointWriter, engine: TinyEngine, step: int, **values: object) -> bool:
    engine.step = step
    writer.save(engine, meta_at(step, **values))
    return writer.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    writer, engine = CheckpointWriter(folder, Checkpoint(), 0), TinyEngine()
    assert writer.wait()
    assert writer.last is None
    guard = {"in_a_row": 0, "losses": [1.5, float("inf")], "mode": "skip"}
    assert save(writer, engine, 7, metrics={"top1": float("nan")}, metrics_step=5, guard=guard)
    path = folder / "step-00000007"
    assert (writer.last, writer.failed) == (path, 0)
    assert writer.stall_seconds > 0
    meta = read_meta(path)
    assert (meta.step, meta.updates, meta.metrics_step, meta.guard, meta.synsets) == (7, 7, 5, guard, SYNSETS)
    assert meta.metrics["top1"] != meta.metrics["top1"]
    assert sorted(meta.files) == ["ema.safetensors", "model.safetensors", "optimizer.safetensors"]
    for name, record in meta.files.items():
        content = (path / name).read_bytes()
        assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    (tmp_path / "plain").touch()  # who may read a checkpoint is the umask's business
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}
    states = {"model": read_tensors(path / "model.safetensors"), **read_optimizer(path)}
    assert sorted(states) == ["ema", "exp_avg", "exp_avg_sq", "model"]
    for state, tensors in states.items():
        expected = engine.full_state(state)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert verify(path) == []
    assert CheckpointWriter(folder, Checkpoint(), 0).last == path  # what a resumed run finds


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "checkpoints", Checkpoint(), 3)
    assert save(writer, TinyEngine(rank=3), 5)
    assert not (tmp_path / "checkpoints").exists()


def test_training_goes_on_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk holds up the write, not `save`; the next `save` waits before it gathers: memory holds one state."""
    gate = threading.Event()

    def slow(tensors: dict[str, torch.Tensor], path: Path, metadata: None) -> None:
        assert gate.wait(PATIENCE_SECONDS)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    writer, engine = CheckpointWriter(tmp_path, Checkpoint(), 0), TinyEngine()
    engine.step = 1
    writer.save(engine, meta_at(1))
    assert names(tmp_path) in ([], [".tmp-step-00000001"])
    assert writer.last is None

    gathered_early = []
    full_state = engine.full_state

    def watched(state: str, everywhere: bool = False) -> dict[str, torch.Tensor]:
        gathered_early.append(not (tmp_path / "step-00000001").exists())
        return full_state(state, everywhere)

    engine.full_state = watched  # type: ignore[method-assign]
    wait = writer.wait

    def waited() -> bool:
        gate.set()  # not before somebody waits for the write
        return wait()

    writer.wait = waited  # type: ignore[method-assign]
    assert save(writer, engine, 2)
    assert gathered_early == [False] * 4
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_a_fault_of_ours_is_not_swallowed(tmp_path: Path) -> None:
    """What safetensors refuses is no full disk: it is raised where the run can see it, once."""
    writer, engine = CheckpointWriter(tmp_path, Checkpoint(), 0), TinyEngine()

    class Transposed(TinyEngine):
        def full_state(self, state: str, everywhere: bool = False) -> dict[str, torch.Tensor]:
            return {"weight": torch.zeros(3, 2).T}

    writer.save(Transposed(), meta_at(1))
    with pytest.raises(ValueError, match="non contiguous"):
        save(writer, engine, 2)
    assert not writer.wait()
    assert save(writer, engine, 3)
    assert names(tmp_path) == ["latest", "step-00000003"]


def test_retention_and_links(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    settings = Checkpoint(keep_last=2, keep_every_steps=50, best_metric="top1")
    writer, engine = CheckpointWriter(folder, settings, 0), TinyEngine()
    for step, top1, in_a_row in ((10, 50.0, 0), (20, 70.0, 0), (50, 60.0, 0), (60, 65.0, 1), (70, 70.5, 1)):
        values = {"metrics": {"top1": top1}, "metrics_step": step, "guard": {"in_a_row": in_a_row}}
        assert save(writer, engine, step, **values)
        best = 10 if step == 10 else 70 if step == 70 else 20
        assert os.readlink(folder / "latest") == f"step-{step:08d}"
        assert os.readlink(folder / "best") == f"step-{best:08d}"
    assert names(folder) == ["best", "latest", *(f"step-{step:08d}" for step in (50, 60, 70))]
    # Relative links survive a move; what they name is found through them.
    moved = tmp_path / "moved"
    os.rename(tmp_path / "run", moved)
    assert locate(moved / "checkpoints" / "best") == moved / "checkpoints" / "step-00000070"
    assert read_meta(moved / "checkpoints" / "latest").step == 70
    # A damaged one is neither counted nor deleted, nor the target of a link.
    (moved / "checkpoints" / "step-00000070" / "model.safetensors").unlink()
    writer = CheckpointWriter(moved / "checkpoints", settings, 0)
    assert writer.last is not None
    assert writer.last.name == "step-00000060"
    for step in (80, 90):
        assert save(writer, engine, step)
    assert names(moved / "checkpoints") == ["best", "latest", *(f"step-{step:08d}" for step in (50, 60, 70, 80, 90))]
    assert os.readlink(moved / "checkpoints" / "best") == "step-00000060"


def test_without_links(tmp_path: Path) -> None:
    """Something stands where the link would be, or the file system has none: the checkpoint is what counts."""
    (tmp_path / "latest").mkdir()
    writer = CheckpointWriter(tmp_path, Checkpoint(), 0)
    assert save(writer, TinyEngine(), 1)
    assert (writer.failed, verify(tmp_path / "step-00000001")) == (0, [])
    assert (tmp_path / "latest").is_dir()


def test_a_step_is_saved_again(tmp_path: Path) -> None:
    writer, engine = CheckpointWriter(tmp_path, Checkpoint(), 0), TinyEngine()
    assert save(writer, engine, 5)
    assert save(writer, engine, 5, metrics={"top1": 3.0})
    assert read_meta(tmp_path / "step-00000005").metrics == {"top1": 3.0}
    assert verify(tmp_path / "step-00000005") == []
    assert names(tmp_path) == ["latest", "step-00000005"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 48 MB: 32 are to stay free, so it takes a few checkpoints of 4 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48M", "tmpfs", str(mount)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk(small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ballast = small_disk / "run" / "checkpoints", small_disk / "ballast"
    writer, engine = CheckpointWriter(folder, Checkpoint(), 0), TinyEngine(floats=MB // 4)
    assert save(writer, engine, 1)
    first = writer.last
    ballast.write_bytes(bytes(10 * MB))
    before = names(folder)

    # Known beforehand: nothing is written, and the 32 MB stay free.
    assert not save(writer, engine, 2)
    told = capsys.readouterr().err
    assert re.match(
        r"CHECKPOINT NOT WRITTEN: step 2: no space left for its 37\.\d MB; training goes on; the newest", told
    )
    assert re.search(
        r"the newest checkpoint is step-00000001; free \d\.\d MB at .*checkpoints \(1 failed so far\)", told
    )

    # Another writer fills the disk while ours is at it: safetensors meets the full disk in the middle of a file.
    monkeypatch.setattr(checkpoint, "SPARE_BYTES", -MB * 1000)
    ballast.write_bytes(bytes(42 * MB))
    assert not save(writer, engine, 3)
    assert (
        "step 3: No space left on device; training goes on; the newest checkpoint is step-0000"
        in capsys.readouterr().err
    )
    assert (writer.failed, writer.last, names(folder), verify(first)) == (2, first, before, [])

    monkeypatch.undo()
    ballast.unlink()
    assert save(writer, engine, 4)
    assert (writer.failed, capsys.readouterr().err) == (2, "")
    assert [verify(folder / name) for name in ("step-00000001", "step-00000004")] == [[], []]


@pytest.fixture
def short_files() -> Iterator[None]:
    """The system refuses files over 100 kB to this process, in the middle of writing them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_any_refusal_of_the_system(tmp_path: Path, short_files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where stderr is a file on the same full disk, so that nothing can be told."""
    writer = CheckpointWriter(tmp_path, Checkpoint(), 0)
    small, large = TinyEngine(), TinyEngine(floats=50_000)
    assert not save(writer, large, 1)
    assert (writer.failed, writer.last, names(tmp_path)) == (1, None, [])
    assert save(writer, small, 2)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", closefd=False))
        assert not save(writer, large, 3)
    assert (writer.failed, names(tmp_path)) == (2, ["latest", "step-00000002"])
    (tmp_path / "a file").write_text("")
    nowhere = CheckpointWriter(tmp_path / "a file" / "checkpoints", Checkpoint(), 0)
    assert not save(nowhere, small, 1)


KILLED = """
import os, random, signal, sys, time
sys.path[:0] = [{root!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.support.checkpoints import TinyEngine, meta_at
from pipeline.checkpoints.state import CheckpointWriter
from pipeline.checkpoints.files import step_folders, step_of, verify
from pipeline.config.sections import Checkpoint

def there():  # what was begun, or what is whole, in turn
    begin = "step-" if attempts % 2 else ".tmp-step-"
    return {{(entry.name, entry.inode()) for entry in os.scandir(folder) if entry.name.startswith(begin)}}

folder, interrupted, attempts, newest = Path(sys.argv[1]), 0, 0, 0
folder.mkdir()
while (attempts < 10 or interrupted < 4) and attempts < 100:
    attempts += 1
    before = there()
    child = os.fork()
    if child == 0:
        writer, engine = CheckpointWriter(folder, Checkpoint(keep_last=2), 0), TinyEngine(floats=500_000)
        for engine.step in range(newest + 1, newest + 1000):
            writer.save(engine, meta_at(engine.step))
        os._exit(3)
    while not there() - before:
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    interrupted += any(folder.glob(".tmp-step-*"))
    found = step_folders(folder)
    assert [fault for path in found for fault in verify(path)] == []
    before, newest = newest, step_of(found[-1]) if found else 0
    assert newest >= before and len(found) >= min(newest, 2), (before, newest)
print(interrupted, newest)
"""


def test_sigkill_leaves_only_whole_ones(tmp_path: Path) -> None:
    """Runs killed soon after something new is in the folder, one continuing the other: what has a final name is whole,
    and nothing is lost.
    """
    script = tmp_path / "saves.py"
    script.write_text(KILLED.format(root=str(ROOT)))
    folder = tmp_path / "checkpoints"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    interrupted, newest = map(int, done.stdout.split())
    assert interrupted >= 4  # by what they left: in the middle of a write
    writer = CheckpointWriter(folder, Checkpoint(keep_last=2), 0)
    assert save(writer, TinyEngine(), newest + 1)
    assert names(folder) == ["latest", f"step-{newest:08d}", f"step-{newest + 1:08d}"]  # what was left is cleared
