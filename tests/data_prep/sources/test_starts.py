"""Archives that only one process can read, begun again in the middle: the same chunks, whatever was done before."""

import gzip
import random
import tarfile
from itertools import pairwise

import pytest

from data_prep.sources import gunzip
from data_prep.sources.detect import open_source
from data_prep.sources.refusal import Refusal
from data_prep.sources.streams import SourceError
from data_prep.storage import Folder
from tests.support.source_forms import all_chunks, tar_of, write

CHUNK_BYTES = 100_000


def images(folder: str, count: int, seed: int) -> dict[str, bytes]:
    rng = random.Random(seed)
    # Noise with text: blocks of every kind.
    return {
        f"{folder}{i}.JPEG": rng.randbytes(rng.randrange(9000)) + b"text" * rng.randrange(500) for i in range(count)
    }


def tars() -> bytes:
    found = {"readme.txt": b"no image"}
    for number in range(1, 9):
        wnid = f"n{number:08d}"
        found[f"{wnid}.tar"] = tar_of(images(f"{wnid}_", 40, number))
    # As after a lost header: images that stand beside the tars.
    return tar_of({**found, **images("n00000009_", 60, 9), **images("n00000010_", 60, 10)})


def tree() -> bytes:
    names = {f"set/{split}/n{number:08d}/": split for number in range(1, 9) for split in ("train", "val")}
    files = {
        name: data for folder in sorted(names, key=names.__getitem__) for name, data in images(folder, 20, 1).items()
    }
    return tar_of({"set/train/n00000001/odd.txt": b"", **files}, tarfile.PAX_FORMAT)


def validation() -> bytes:
    return tar_of({f"ILSVRC2012_val_{i:08d}.JPEG": d for i, d in enumerate(images("", 200, 3).values(), 1)})


def damaged() -> bytes:
    data = bytearray(tars())
    for at in (300_000, 800_000):
        data[at : at + 20_000] = random.Random(0).randbytes(20_000)
    return bytes(data)


FORMS = {"tars": tars, "tree": tree, "validation": validation, "damaged": damaged}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_chunks_whatever_was_done_before(tmp_path, form, monkeypatch):
    monkeypatch.setattr(gunzip, "PLACE_EVERY_BYTES", 1 << 17)
    options = {}
    if form == "validation":
        labels = "".join(f"ILSVRC2012_val_{i:08d} n{i % 7 + 1:08d}\n" for i in range(1, 201))
        options = {"split": "val", "labels": write(tmp_path / "labels.txt", labels.encode())}
    content = FORMS[form]()
    path, spool = write(tmp_path / "a.tar.gz", gzip.compress(content)), Folder(tmp_path / "spool")
    wanted = all_chunks(open_source(path, **options), CHUNK_BYTES, spool)
    items = [list(chunk.items()) for chunk in wanted]
    records = {name: spool.read(name) for name in spool.names("*.start")}
    assert len(records) >= 3
    begun = []
    for done in [range(number) for number in range(len(wanted) + 1)] + [{0, 1, 2, 5, len(wanted) - 1}]:
        for name in spool.names():
            spool.remove(name)
        for name, data in records.items():
            spool.write(name, data)
        source = open_source(path, **options)
        found = all_chunks(source, CHUNK_BYTES, spool, done=done)
        begun.append(source.begun_at)
        for number, (chunk, known) in enumerate(zip(found, wanted, strict=True)):
            assert (chunk.number, chunk.split, chunk.bytes, chunk.classes, chunk.label) == (
                (known.number, known.split, known.bytes, known.classes, known.label)
            )
            assert (chunk.spool is None) == (number in done)
            if number not in done:
                assert list(chunk.items()) == items[number]
    assert all(before <= after for before, after in pairwise(begun[:-1]))
    assert begun[0] == begun[1] == 0
    assert begun[-2] > len(content) / 2
    assert begun[-1] <= begun[3]
    # Records that another cut, or a full disk, has left count for nothing.
    for cut, spoiled in ((CHUNK_BYTES + 1, None), (CHUNK_BYTES, b"{")):
        for name, data in records.items():
            spool.write(name, spoiled or data)
        source = open_source(path, **options)
        all_chunks(source, cut, spool, done=range(len(wanted)))
        assert source.begun_at == 0


def test_what_was_refused_is_refused_when_it_goes_on(tmp_path, monkeypatch):
    """A class folder beside the splits: they may lie far from each other in the archive."""
    monkeypatch.setattr(gunzip, "PLACE_EVERY_BYTES", 1 << 17)
    names = [f"set/other/n{number:08d}/" for number in range(1, 9)]
    files = {name: data for folder in names for name, data in images(folder, 30, 1).items()}
    path = write(tmp_path / "a.tar.gz", gzip.compress(tar_of({**files, "set/train/n00000001/a.JPEG": b"1"})))
    spool = Folder(tmp_path / "spool")
    for done in ((), range(100)):
        source = open_source(path, kind="tar-of-class-folders")
        with pytest.raises(SourceError, match="set/other holds class folders, and is no split by its name"):
            all_chunks(source, CHUNK_BYTES, spool, done=done)
        assert (source.begun_at > 0) == bool(done)


def test_what_a_refusal_has_seen_is_kept():
    told = Refusal("a.tar.gz", "images", "train")
    told.see("train", "n00000001", None, damaged=False)
    other = Refusal("a.tar.gz", "images", "train")
    other.restore(told.state())
    other.at_end()
    with pytest.raises(SourceError, match="is empty"):
        Refusal("a.tar.gz", "images", "train").at_end()
