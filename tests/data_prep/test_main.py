"""The command line: paths as users give them, and places that nothing can be written to."""

from __future__ import annotations

import argparse
import http.server
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import COMMANDS, build_parser, main
from data_prep.manifest import Manifest, dataset_folder
from data_prep.storage import Folder, StorageError, user_path
from tests.support.archives import archive, shard
from tests.support.read_only import run_beside


def options(name: str) -> list[argparse.Action]:
    parser = build_parser([name])
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [action for action in commands.choices[name]._actions if action.nargs != 0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_path_may_begin_with_a_home_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that takes text either has a type that expands ~, or is known to be no path."""
    monkeypatch.setenv("HOME", "/home/of-somebody")
    for action in options(name):
        takes_text = action.type in (None, Path) and not action.choices
        told = action.metavar in ("PATH", "DIR", "FILE", "DATASET", "VAL", "A", "B", "SPACE", "ADDRESS", "MAP.json")
        assert not (takes_text and told), f"{name}: {action.dest} takes a path as it is"
        if told:
            assert action.type is not None
            assert str(action.type("~/x")) == "/home/of-somebody/x"  # type: ignore[operator]
            assert action.type("s3://bucket/~/x") == "s3://bucket/~/x"  # type: ignore[operator]


def test_a_quoted_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "s.tar", count=4)
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("n00000001\tn00000001_0.JPEG\n")
    assert shard("~/s.tar", "~/out", "--work", "~/work", "--exclude", "~/exclude.txt") == 0
    assert Manifest.load(tmp_path / "out").split("train").samples == 11
    assert main(["verify", "~/out", "--workers", "1"]) == 0
    assert main(["labels", "~/out", "~/out", "--output", "~/map.json"]) == 0
    assert main(["duplicates", "~/out", "--within", "--output", "~/d", "--workers", "1"]) == 0
    assert not (tmp_path / "~").exists()
    assert {"map.json", "d", "work"} <= set(os.listdir(tmp_path))


def test_the_manifest_in_place_of_its_folder(datasets: Any, tmp_path: Path) -> None:
    file = str(datasets.in22k / "dataset.json")
    assert main(["verify", file, "--workers", "1", "--fast"]) == 0
    assert main(["labels", file, "imagenet-1k"]) == 0
    other = str(datasets.in1k / "dataset.json")
    assert main(["duplicates", file, "--against", other, "--output", str(tmp_path), "--workers", "1"]) == 0
    assert main(["index", file]) == 1
    assert (dataset_folder("dataset.json"), dataset_folder("/dataset.json")) == (".", "/")
    assert dataset_folder("s3://bucket/set/dataset.json") == "s3://bucket/set"


def test_outputs_that_cannot_be_written_to(datasets: Any, tmp_path: Path) -> None:
    """One line, at once: before a source is looked at, and before anything is hashed."""
    source = archive(tmp_path / "s.tar", count=4)
    place = tmp_path / "place"
    place.mkdir()
    out = str(place / "out")
    fixed = ("--source", str(source), "--min-side", "8")
    for arguments, advice in (
        (("shard", *fixed, "--output", out, "--workers", "1"), "choose another --output"),
        (("shard", *fixed, "--output", str(tmp_path / "o"), "--work", out, "--workers", "1"), "another --work"),
        (("plan", *fixed, "--output", out), "choose another --output"),
        (("duplicates", str(datasets.in22k), "--within", "--output", out, "--workers", "1"), "say with --output"),
        (("demo", "--output", out), "choose another --output"),
        (("labels", "imagenet-1k", "fall11", "--output", f"{out}/map.json"), "write to where"),
    ):
        done = run_beside(place, "data_prep", *arguments)
        assert done.returncode == 1, (arguments, done.stdout, done.stderr)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: "), line
        assert "Read-only file system" in line, line
        assert advice in line, line
    assert not list(place.iterdir())


def test_a_data_set_on_a_read_only_place_is_read(datasets: Any) -> None:
    done = run_beside(datasets.in22k, "data_prep", "verify", str(datasets.in22k), "--workers", "1")
    assert done.returncode == 0, done.stderr
    done = run_beside(datasets.in22k, "data_prep", "duplicates", str(datasets.in22k), "--within", "--workers", "1")
    assert done.returncode == 1
    assert "say with --output" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_no_path_is_given_twice(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse would take the last one, and drop the first without a word."""
    for action in options(name):
        if action.option_strings and action.type is user_path and action.nargs is None:
            option = action.option_strings[0]
            with pytest.raises(SystemExit) as ended:
                main([name, option, "a", option, "a"])
            assert ended.value.code == 2
            assert f"{option} is given twice" in capsys.readouterr().err


def test_places_that_are_not_what_they_should_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = archive(tmp_path / "s.tar", count=1)
    for arguments, said in (
        (("index", str(file)), "s.tar is a file: give the folder"),
        (("index", str(tmp_path / "gone")), "gone does not exist: check the path"),
        (("verify", str(file)), "s.tar is a file, and no folder"),
    ):
        assert main(arguments) == 1
        assert said in "".join(capsys.readouterr())


class _Fails(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(int(self.path.split("/")[1]))

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def test_servers_that_refuse_or_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is told by what it said; only what is missing does not exist."""
    out = str(tmp_path / "out")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Fails) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        shards = [(f"{at}/{code}/x.tar", str(code)) for code in (403, 500)]
        for url, said in (*shards, (f"{at}/404/x.tar", "does not exist"), (f"{nobody}/x.tar", "Cannot connect")):
            assert main(["shard", "--source", url, "--output", out]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert said in line, line
            assert url in line, line
            assert ("does not exist" in line) == ("/404/" in url), line
        for url, said in ((f"{at}/403/x", "403"), (f"{at}/500/x", "500"), (f"{nobody}/x", "Cannot connect")):
            assert main(["index", url]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert said in line, line
            assert url in line, line
        server.shutdown()


def test_a_store_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a store of its own exceptions, which are no OSErrors."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Unable to locate\ncredentials")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", refuse)
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.ls", refuse)
    for ask in (lambda folder: folder.sizes(), lambda folder: folder.exists("x")):
        with pytest.raises(StorageError, match=r"memory://a\S* cannot be read \(Unable to locate credentials\)"):
            ask(Folder("memory://a"))
