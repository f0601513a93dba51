"""One writer at a time: commands that are started together, and locks where folders cannot be locked."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import main
from data_prep.manifest import Manifest, ShardIndex, index_path
from data_prep.storage import TEMP_MARK, Folder, atomic_folder
from data_prep.writer import LOCK_NAME, BusyError, sole_writer
from tests.data_prep.foreign.test_index import A, B, C, by_key, write_tar
from tests.support.archives import archive, command
from tests.support.datasets import needs_ffcv
from tests.support.processes import PATIENCE_SECONDS
from tests.support.runs import ROOT


def together(commands: list[list[str]]) -> list[tuple[int, str]]:
    """(exit code, errors) of commands that are started at the same moment: each waits for a line on its input."""
    held = "import sys; sys.stdin.readline(); import runpy; sys.argv = sys.argv[1:]; "
    started = []
    for program in commands:
        assert program[:2] == [sys.executable, "-m"]
        code = held + f"runpy.run_module({program[2]!r}, run_name='__main__', alter_sys=True)"
        arguments = [sys.executable, "-c", code, *program[2:]]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(arguments, cwd=ROOT, text=True, **pipes))
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=PATIENCE_SECONDS)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, told, strict=True)]


def check_together(results: list[tuple[int, str]], *refusals: str) -> None:
    """At least one did it, the others did too or were told that another does."""
    assert any(code == 0 for code, _ in results), results
    for code, text in results:
        assert "Traceback" not in text, text
        if code:
            last = text.strip().splitlines()[-1]
            assert code == 1, text
            assert any(words in last for words in ("another run is writing to", *refusals)), last


def check_folder(folder: Path) -> None:
    assert not [path for path in folder.rglob("*") if TEMP_MARK in path.name]
    assert main(["verify", str(folder), "--workers", "1"]) == 0


def prep(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "data_prep", *map(str, arguments)]


def test_shards(tmp_path: Path) -> None:
    source = archive(tmp_path / "s.tar", count=30)
    check_together(together([command(source, tmp_path / "out", "--workers", "1", "--min-side", "8")] * 3))
    check_folder(tmp_path / "out")


@needs_ffcv
def test_betons_of_shards_that_are_there(tmp_path: Path) -> None:
    source = archive(tmp_path / "s.tar", count=30)
    shards = command(source, tmp_path / "out", "--workers", "1", "--min-side", "8")
    assert together([shards])[0][0] == 0
    results = together([[*shards, "--format", "ffcv", "--beton-mode", mode] for mode in ("jpg", "raw")])
    check_together(results)
    assert [len(split.betons) for split in Manifest.load(tmp_path / "out").splits.values()] == [1, 1]
    check_folder(tmp_path / "out")


def tars(folder: Path) -> Path:
    folder.mkdir()
    for number in range(4):
        by_key(folder / f"train-{number}.tar", (C, (A, B)[number % 2]) * 20, first=100 * number)
    return folder


def check_labels(folder: Path) -> None:
    """Keys tell their classes: a label of an index that another process left in the order of its tar is another."""
    manifest = Manifest.load(folder)
    for entry in manifest.split("train").shards:
        rows = ShardIndex.load(folder / index_path(entry.file))
        assert [key[:9] for key in rows.keys] == [manifest.synsets[label] for label in rows.labels]


def test_indexes(tmp_path: Path) -> None:
    folder = tars(tmp_path / "tars")
    check_together(together([prep("index", folder)] * 3), "has a dataset.json already")
    check_labels(folder)
    check_folder(folder)


@pytest.mark.parametrize("folders_lock", [True, False])
def test_runs_whose_preflight_indexes_the_same_tars(tmp_path: Path, folders_lock: bool) -> None:
    """All wait for the first; also on NFS, which cannot lock a folder."""
    folder = tars(tmp_path / "tars")
    (tmp_path / "sitecustomize.py").write_text(NFS if not folders_lock else "")
    code = f"from data_prep.foreign.index import ensure_indexed; ensure_indexed({str(folder)!r})"
    program = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    started = [
        subprocess.Popen(program, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    told = [process.communicate(timeout=PATIENCE_SECONDS) for process in started]
    assert [process.returncode for process in started] == [0] * 4, told
    assert (folder / LOCK_NAME).exists() != folders_lock
    check_labels(folder)
    check_folder(folder)


NFS = """
import errno, fcntl, os, stat
flock = fcntl.flock
def of_files_that_are_open_for_writing(handle, how):
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    flock(handle, how)
fcntl.flock = of_files_that_are_open_for_writing
"""


def test_duplicates(datasets: Any, tmp_path: Path) -> None:
    one = prep("duplicates", datasets.in22k, "--within", "--output", tmp_path / "d", "--workers", "1")
    other = prep("duplicates", datasets.in22k, "--against", datasets.in1k, *one[-4:])
    check_together(together([one, other]))
    assert not [path for path in (tmp_path / "d").rglob("*") if TEMP_MARK in path.name]


def test_every_command_that_writes_is_refused_beside_another(
    tmp_path: Path, datasets: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_tar(out / "train.tar", [(f"{A}_1.jpg", b"1")])
    source = archive(tmp_path / "s.tar", count=4)
    with sole_writer(Folder(out)):
        for arguments in (
            ("shard", "--source", source, "--output", out, "--workers", "1", "--min-side", "8"),
            ("index", out),
            ("duplicates", datasets.in22k, "--within", "--output", out, "--workers", "1"),
            ("demo", "--output", out),
        ):
            assert main([str(argument) for argument in arguments]) == 1
            assert f"error: another run is writing to {out}" in capsys.readouterr().err.splitlines()[-1]


def test_a_lock_where_folders_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def flock(handle: int, how: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(9, "Bad file descriptor")
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with sole_writer(Folder(tmp_path)), pytest.raises(BusyError), sole_writer(Folder(tmp_path)):
        pass
    with sole_writer(Folder(tmp_path)):
        pass


def test_a_folder_that_two_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is put there whole, in place of the other's, and nothing is left beside it."""
    final, rename, others = tmp_path / "result", os.rename, iter((1, 2))

    def raced(old: Path, new: Path) -> None:
        if new == final and (number := next(others, None)):  # the other one is faster, twice
            final.mkdir(exist_ok=True)
            (final / "other").write_text(str(number))
        rename(old, new)

    monkeypatch.setattr(os, "rename", raced)
    with atomic_folder(final) as folder:
        (folder / "mine").write_text("")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["result", "result/mine"]
