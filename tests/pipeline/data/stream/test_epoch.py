"""What an epoch of a stream is made of, on any number of ranks and workers, and what is left of it after a restart."""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from data_prep.manifest import ManifestError
from pipeline.config.sections import ConfigError
from pipeline.data.order import validation_samples
from pipeline.data.shards import DataError
from pipeline.data.stream.manifest import look_into, streamed_set
from pipeline.data.stream.route import ShardLengths
from tests.support.datasets import Datasets
from tests.support.loading import same_images
from tests.support.streams import LENGTHS, UNCOUNTED, Tars, by_step, configured, counted, read, write_tars

STREAM = "data.reader=stream"


@pytest.fixture(scope="module")
def tars(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Tars:
    return write_tars(datasets, tmp_path_factory.mktemp("tars") / "told").told()


@pytest.fixture(scope="module")
def untold(datasets: Datasets, tmp_path_factory: pytest.TempPathFactory) -> Tars:
    return write_tars(datasets, tmp_path_factory.mktemp("tars") / "untold")


@pytest.mark.parametrize(("where", "workers"), itertools.product(("host", "device"), (0, 2)))
def test_an_epoch_is_the_set_on_any_number_of_ranks_and_workers(
    datasets: Datasets, tars: Tars, where: str, workers: int
) -> None:
    """Six steps of 16 are all 96 samples, whatever the shards hold: through streams as through indexes."""
    how = (f"augment.where={where}", f"data.workers_per_rank={workers}")
    indexed = counted(read(datasets, *how))
    assert len(indexed) == sum(LENGTHS)
    assert set(indexed.values()) == {1}
    for ranks in (1, 2, 4):
        ours = read(datasets, STREAM, *how, ranks=ranks)
        theirs = read(datasets, *tars.options(*how), ranks=ranks)
        for found in (ours, theirs):
            assert {len(batches) for batches in found} == {24 // ranks}  # no rank has more steps than another
            assert counted(found) == indexed


def test_the_order_is_that_of_the_seed_and_the_epoch_alone(datasets: Datasets, tars: Tars) -> None:
    orders = {}
    for ranks, workers, where in ((1, 0, "host"), (2, 2, "device"), (4, 2, "host")):
        how = (f"data.workers_per_rank={workers}", f"augment.where={where}")
        orders[ranks] = by_step(read(datasets, *tars.options(*how), ranks=ranks, last=12))
    assert orders[1] == orders[2] == orders[4]
    first, second = orders[1][:6], orders[1][6:]
    assert first != second
    assert Counter(itertools.chain(*first)) == Counter(itertools.chain(*second))
    assert by_step(read(datasets, *tars.options("seed=1"))) != first


def test_images_are_those_of_the_indexed_reader(datasets: Datasets) -> None:
    """A view's key is that of its sample and epoch: the picture does not depend on who read it."""
    for where in ("host", "device"):
        (indexed,) = read(datasets, f"augment.where={where}")
        (streamed,) = read(datasets, STREAM, f"augment.where={where}")
        assert same_images(indexed, streamed)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("told", [True, False])
def test_a_run_that_goes_on_at_any_step_gets_the_same_samples(
    datasets: Datasets, tars: Tars, untold: Tars, told: bool, repeats: int
) -> None:
    """Over two epochs, from each step on, on other numbers of ranks."""
    options = tars.options() if told else untold.options(UNCOUNTED)
    options += [f"augment.repeats={repeats}", "augment.where=device"]
    whole = by_step(read(datasets, *options, last=12))
    for first in range(1, 12):
        assert by_step(read(datasets, *options, first=first, last=12, ranks=(1, 2, 4)[first % 3])) == whole[first:]


def test_uncounted_shards_give_every_rank_the_samples_that_it_was_told(datasets: Datasets, untold: Tars) -> None:
    """48 of the 96 an epoch, or 160: the same number of steps on each rank; lanes of few samples go round again."""
    for samples in (48, 96, 160):
        options = untold.options(f"data.stream_samples_per_epoch={samples}")
        for ranks in (1, 2, 4):
            found = read(datasets, *options, ranks=ranks)
            assert {len(batches) for batches in found} == {samples // 4 // ranks}


def test_whole_shards_are_passed_over_once_their_lengths_are_known(
    datasets: Datasets, untold: Tars, tmp_path: Path
) -> None:
    """The run keeps what it learned of shards; a run that goes on opens only those that it still needs."""
    opened = tmp_path / "opened"
    command = f"pipe:echo x >> {opened}; cat {untold.folder}/train-{{0..7}}.tar"
    options = untold.options(UNCOUNTED, "data.workers_per_rank=0", "data.shuffle_lanes=1")
    options[1] = f"data.path={command}"
    folder = tmp_path / "stream"
    (whole,) = read(datasets, *options, lengths=ShardLengths(folder, writes=True))
    assert len(opened.read_text().split()) == 8
    lines = [json.loads(line) for line in (folder / "lane-00000.jsonl").read_text().splitlines()]
    learned = {line["shard"]: line["samples"] for line in lines}
    assert len(learned) == 7
    assert learned.items() < dict(enumerate(LENGTHS)).items()
    opened.unlink()
    (rest,) = read(datasets, *options, first=5, lengths=ShardLengths(folder))
    assert same_images(whole[20:], rest)
    assert len(opened.read_text().split()) <= 3  # of eight: 7 samples of a window and 16 of a step


def test_what_does_not_fit_is_said_before_anything_is_read(datasets: Datasets, untold: Tars) -> None:
    with pytest.raises(ConfigError, match=r"3 ranks do not divide data\.shuffle_lanes 4"):
        read(datasets, STREAM, "train.global_batch=48", ranks=3)
    with pytest.raises(ConfigError, match=r"names 8 shards, fewer than data\.shuffle_lanes 16"):
        read(datasets, *untold.options(UNCOUNTED, "data.shuffle_lanes=16"))
    with pytest.raises(ConfigError, match=r"put an _info\.json beside the shards.* or set data\.stream_samples"):
        configured(datasets, *untold.options())


def test_each_folder_of_a_list_says_what_is_in_its_own_shards(datasets: Datasets, tars: Tars, tmp_path: Path) -> None:
    """Shards of one name in two folders are counted by two files."""
    other = tmp_path / "other"
    other.mkdir()
    for number in (4, 5):
        shutil.copy(tars.folder / f"train-{number}.tar", other / f"train-{number - 4}.tar")
    Tars(other, tars.classes).told((9, 17))
    lists = f"data.path={tars.folder}/train-{{0..3}}.tar::{other}/train-{{0..1}}.tar"
    _, manifest, _ = configured(datasets, *tars.options(lists))
    assert [entry.samples for entry in manifest.split("train").shards] == [5, 20, 11, 14, 9, 17]
    found = counted(read(datasets, *tars.options(lists)))
    assert len(found) == 4 * 16
    (other / "_info.json").unlink()
    with pytest.raises(ConfigError, match="in each of their folders"):
        configured(datasets, *tars.options(lists))


def test_counts_that_contradict_each_other_are_told(datasets: Datasets, tars: Tars, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    shutil.copytree(tars.folder, folder)
    info = json.loads((folder / "_info.json").read_text())
    for change in ({"shard_lengths": [-5, *LENGTHS[1:]]}, {"num_samples": 1000}):
        wrong = {"splits": {"train": {**info["splits"]["train"], **change}}}
        (folder / "_info.json").write_text(json.dumps(wrong))
        with pytest.raises(ManifestError, match="are below 0, or do not add up to its num_samples"):
            configured(datasets, *tars.options(f"data.path={folder}"))


def test_lists_that_cannot_be_meant_are_told_in_their_words(datasets: Datasets, tars: Tars) -> None:
    with pytest.raises(ConfigError, match=r"a stream takes no \*: name the shards by braces"):
        configured(datasets, *tars.options(f"data.path={tars.folder}/train-*.tar"))
    with pytest.raises(DataError, match=r"none-0\.tar cannot be read"):  # and not that nothing counts its samples
        configured(datasets, *tars.options("data.path=/none-{0..1}.tar"))
    config, manifest, _ = configured(datasets, *tars.options("evaluate.every_epochs=1"))
    with pytest.raises(ManifestError, match=r"or name validation shards in data\.stream_val"):
        validation_samples(config, manifest)


def test_local_shards_that_are_not_there_are_told_before_a_run(datasets: Datasets, tars: Tars, tmp_path: Path) -> None:
    """With on_bad_sample=skip a run does without them, even the last."""
    folder = tmp_path / "tars"
    shutil.copytree(tars.folder, folder)
    for number in (3, 7):
        (folder / f"train-{number}.tar").unlink()
    options = tars.options(f"data.path={folder}/train-{{0..7}}.tar")
    config, manifest, _ = configured(datasets, *options)
    said: list[str] = []
    with pytest.raises(DataError, match=r"train-3\.tar cannot be read"):
        look_into(streamed_set(config.data, manifest), config.data, "train", said.append)
    config, manifest, _ = configured(datasets, *options, "data.on_bad_sample=skip")
    look_into(streamed_set(config.data, manifest), config.data, "train", said.append)
    assert [line.split(": ")[0].rpartition("/")[2] for line in said] == [
        "train-3.tar cannot be read",
        "train-7.tar cannot be read",
    ]
    check = config.data.how_to_check
    assert "verify" not in check


def test_damage_names_its_shard(datasets: Datasets, tars: Tars, tmp_path: Path) -> None:
    """A shard that is cut, missing, of another build: an error in its words; or counted, with other samples instead."""

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:40_000])

    damages = {
        "cut": (cut, r"train-3\.tar"),
        "missing": (Path.unlink, r"train-3\.tar cannot be read|train-3\.tar: .*exit code 1"),
        "empty": (lambda path: path.write_bytes(b""), r"train-3\.tar"),
        "another": (lambda path: shutil.copy(path.with_name("train-0.tar"), path), "holds 5 samples, not the 14"),
    }
    for name, (damage, message) in damages.items():
        folder = tmp_path / name
        shutil.copytree(tars.folder, folder)
        damage(folder / "train-3.tar")
        for command in (f"pipe:cat {folder}/train-{{0..7}}.tar", f"{folder}/train-{{0..7}}.tar"):
            options = [*tars.options("augment.where=device"), f"data.path={command}"]
            with pytest.raises(DataError, match=message):
                read(datasets, *options)
            (batches,) = read(datasets, *options, "data.on_bad_sample=skip")
            bad = [bad for batch in batches for bad in batch.bad]
            assert len(batches) == 24
            assert 1 <= len({each.sample for each in bad}) <= 14
            assert all("train-3.tar" in each.error and each.stand_in not in range(36, 50) for each in bad)
            for first in range(1, 6):
                (again,) = read(datasets, *options, "data.on_bad_sample=skip", first=first)
                assert same_images(batches[4 * first :], again)
                assert by_step([again]) == by_step([batches])[first:]


def test_a_failing_shard_of_uncounted_ones_is_one_bad_sample_and_fails_alike_later(
    datasets: Datasets, untold: Tars, tmp_path: Path
) -> None:
    folder = tmp_path / "tars"
    shutil.copytree(untold.folder, folder)
    damaged = folder / "train-3.tar"
    damaged.write_bytes(damaged.read_bytes()[:40_000])
    options = [*untold.options(UNCOUNTED, "data.on_bad_sample=skip"), f"data.path=pipe:cat {folder}/train-{{0..7}}.tar"]
    learned = tmp_path / "stream"
    (whole,) = read(datasets, *options, last=12, lengths=ShardLengths(learned, writes=True))
    bad = [bad for batch in whole for bad in batch.bad]
    assert 1 <= len(bad) <= 4
    assert all("train-3.tar" in each.error for each in bad)
    shutil.copy(untold.folder / damaged.name, damaged)  # somebody mends it: the run goes on as it began
    (rest,) = read(datasets, *options, first=4, last=12, lengths=ShardLengths(learned))
    assert same_images(whole[16:], rest)
    assert [batch.bad for batch in rest] == [batch.bad for batch in whole[16:]]
