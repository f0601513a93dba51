"""What `plan` predicts against what `shard` then makes; refusing a disk that is too small; giving space back."""

import gzip
import json
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from typing import ClassVar

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.build.plan import estimate
from data_prep.build.reclaim import RECORD, Reclaimer, _punch_hole, can_punch_holes
from data_prep.build.shards import ShardSettings
from data_prep.manifest import Manifest
from data_prep.sources.detect import open_source
from data_prep.storage import Folder
from data_prep.writer import BUILD_FOLDER
from tests.support.archives import WNIDS, archive, command, image_bytes, run, shard, tar_bytes
from tests.support.runs import ROOT


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Images of very different sizes, so that a prediction is not trivial."""
    path = tmp_path_factory.mktemp("plan") / "source.tar"
    members = {
        f"{w}.tar": tar_bytes(
            {f"{w}_{i}.JPEG": image_bytes(i, (60 + 37 * i % 300, 50 + 37 * i % 200)) for i in range(100)}
        )
        for w in WNIDS
    }
    path.write_bytes(tar_bytes(members))
    return path


def test_prediction_is_near_the_truth(source, tmp_path, capsys):
    assert shard(source, tmp_path / "out", "--short-side", "128") == 0
    split = Manifest.load(tmp_path / "out").split("train")
    truth = sum(entry.bytes for entry in split.shards)
    found = estimate(open_source(source), ShardSettings(short_side_px=128), images=150)
    assert found.images == pytest.approx(300, rel=0.15)
    assert found.bytes_out == pytest.approx(truth, rel=max(0.1, 3 * found.out_error))
    assert found.classes == 3
    capsys.readouterr()
    assert main(["plan", "--source", str(source), "--output", str(tmp_path / "new"), "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("images", "shards", "disk needed", "disk there", "2 workers"))
    assert not (tmp_path / "new").exists()


def test_compressed_archives_are_sampled_from_their_beginning(source, tmp_path, capsys):
    zipped = tmp_path / "source.tar.gz"
    zipped.write_bytes(gzip.compress(source.read_bytes()))
    found = estimate(open_source(zipped), ShardSettings(), images=100)
    assert found.from_beginning
    assert found.images == pytest.approx(300, rel=0.4)
    assert main(["plan", "--source", str(zipped)]) == 0
    assert "from its beginning" in capsys.readouterr().out


def test_a_disk_that_is_too_small_is_refused_before_work(source, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 9 * 10**5, 10**5))
    assert shard(source, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "needs about" in error
    assert "--ignore-disk" in error
    assert not (tmp_path / "out").exists()
    assert main(["plan", "--source", str(source), "--output", str(tmp_path)]) == 1
    assert shard(source, tmp_path / "out", "--ignore-disk") == 0


def test_holes_free_the_disk(tmp_path):
    if not can_punch_holes(Folder(tmp_path)):
        pytest.skip("this file system cannot punch holes")
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 20))
    before = path.stat().st_blocks
    assert _punch_hole(str(path), 1 << 19)
    assert path.stat().st_blocks == before // 2
    assert path.read_bytes() == bytes(1 << 19) + b"x" * (1 << 19)


def test_a_shard_whose_images_were_given_back_may_not_go(tmp_path):
    if not can_punch_holes(Folder(tmp_path)):
        pytest.skip("this file system cannot punch holes")
    source, out = archive(tmp_path / "s.tar", count=200), tmp_path / "out"
    build = command(source, out, "--workers", "1", "--samples-per-shard", "5", "--min-side", "8")
    process = subprocess.Popen(build, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = out / BUILD_FOLDER / RECORD
    while process.poll() is None and not record.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads(record.read_text())["shards"] >= 5
    data = list((out / BUILD_FOLDER / "chunks").glob("*.data"))
    assert sum(p.stat().st_blocks * 512 for p in data) < sum(p.stat().st_size for p in data) + 4096 * len(data)
    kept = (out / "train-000000.tar").read_bytes()
    (out / "train-000000.tar").unlink()
    done = run(build)
    assert done.returncode == 1
    assert "train-000000.tar of the unfinished build was removed or changed" in done.stderr
    (out / "train-000000.tar").write_bytes(kept)
    next(iter((out / BUILD_FOLDER / "chunks").glob("*.data"))).unlink()
    done = run(build)
    assert done.returncode == 1
    assert "give --force to begin anew" in done.stderr.splitlines()[-1]
    assert run([*build, "--force"]).returncode == 0
    assert (out / "train-000000.tar").read_bytes() == kept


def test_training_shards_that_finish_before_validation_count_later(tmp_path):
    class Chosen:
        chunks: ClassVar[list[str]] = []

    reclaimer = Reclaimer(Chosen(), np.arange(40), 1, Folder(tmp_path))
    punched = []
    reclaimer._punch = punched.append
    reclaimer.able = True
    reclaimer.finish(0, val_done=False)
    reclaimer.finish(1, val_done=False)
    assert not punched
    reclaimer.finish(None, val_done=True)
    assert punched == [2]
    reclaimer.finish(3, val_done=True)
    assert punched == [2]
    reclaimer.finish(2, val_done=True)
    assert punched == [2, 4]
