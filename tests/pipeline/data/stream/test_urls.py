"""Where a stream may come from: folders, lists joined by ::, a web server, an object store, webdataset's cache."""

import shutil
from pathlib import Path

import pytest

from pipeline.config.sections import ConfigError
from pipeline.data.shards import DataError
from tests.support.datasets import Datasets
from tests.support.loading import same_images
from tests.support.object_store import ObjectStore
from tests.support.streams import UNCOUNTED, Tars, by_step, configured, read, write_tars
from tests.support.web import web_server


@pytest.fixture(scope="module")
def tars(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Tars:
    return write_tars(datasets, tmp_path_factory.mktemp("tars") / "set").told()


def test_the_way_to_the_shards_does_not_change_the_samples(
    datasets: Datasets, tars: Tars, tmp_path: Path, s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in s3.environment.items():
        monkeypatch.setenv(key, value)
    for file in tars.folder.iterdir():
        s3.put(f"tars/{file.name}", file.read_bytes())
    (piped,) = read(datasets, *tars.options())
    with web_server(tars.folder) as address:
        ways = {
            "files": f"{tars.folder}/train-{{0..7}}.tar",
            "joined": f"{tars.folder}/train-{{0..4}}.tar::file:{tars.folder}/train-{{5..7}}.tar",
            "web": f"{address}/train-{{0..7}}.tar",
            "s3": "s3://bucket/tars/train-{0..7}.tar",
            "a folder with _info.json": str(tars.folder),
        }
        for name, path in ways.items():
            (found,) = read(datasets, *tars.options(f"data.path={path}"))
            assert same_images(piped, found), name
            assert by_step([found]) == by_step([piped]), name


def test_the_cache_keeps_sets_of_equal_names_apart(datasets: Datasets, tars: Tars, tmp_path: Path) -> None:
    """webdataset 1.0.2 calls a cached file after its name alone: the second set would get the first's samples."""
    root = tmp_path / "web"
    for name in ("a", "b"):
        shutil.copytree(tars.folder, root / name)
    for number in range(8):  # the other way round
        shutil.copy(tars.folder / f"train-{number}.tar", root / "b" / f"train-{7 - number}.tar")
    (root / "b" / "_info.json").unlink()
    cache = (f"data.cache_folder={tmp_path / 'cache'}", "data.stream_cache=true", "data.shuffle_lanes=2")
    with web_server(root) as address:
        found = {}
        for name, more in (("a", ()), ("b", (UNCOUNTED,))):
            path = f"data.path={address}/{name}/train-{{0..7}}.tar"
            (kept,) = read(datasets, *tars.options(path, *cache, *more))
            (plain,) = read(datasets, *tars.options(path, "data.shuffle_lanes=2", *more))
            assert same_images(kept, plain)
            found[name] = path
        kept_files = [file.name for file in (tmp_path / "cache").rglob("*.tar")]
        assert len(kept_files) == len(set(kept_files)) == 16
    # The server is gone.
    lost = [*tars.options(found["b"], *cache), UNCOUNTED]
    (again,) = read(datasets, *lost)
    assert same_images(again, plain)


def test_a_short_shard_does_not_stay_in_the_cache(datasets: Datasets, tars: Tars, tmp_path: Path) -> None:
    """A command that writes half of a shard and says that all is well: the next try fetches it anew."""
    root = Path(shutil.copytree(tars.folder, tmp_path / "tars"))
    whole = (root / "train-3.tar").read_bytes()
    options = tars.options(f"data.path=pipe:cat {root}/train-{{0..7}}.tar", f"data.cache_folder={tmp_path / 'cache'}")
    options += ["data.stream_cache=true", "data.workers_per_rank=0"]
    (root / "train-3.tar").write_bytes(whole[:20_000])
    with pytest.raises(DataError, match=r"train-3\.tar"):
        read(datasets, *options)
    (root / "train-3.tar").write_bytes(whole)
    (found,) = read(datasets, *options)
    assert by_step([found]) == by_step(read(datasets, *tars.options()))


def test_faults_of_urls_are_told(datasets: Datasets, tars: Tars) -> None:
    for path, message in (
        ("pipe:cat /x/{0..3.tar", "Unbalanced braces"),
        (f"{tars.folder}/train-0.tar::{tars.folder}/train-0.tar", "twice"),
        ("${NOT_SET}/train-0.tar", "WDS_NOT_SET"),
    ):
        with pytest.raises(ConfigError, match=message):
            configured(datasets, *tars.options(f"data.path={path}"))
    with pytest.raises(DataError, match=r"nothing://host/train-\d\.tar cannot be read: .*no gopen handler"):
        read(datasets, *tars.options("data.path=nothing://host/train-{0..7}.tar", UNCOUNTED))
