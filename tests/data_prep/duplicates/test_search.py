"""Duplicates: planted ones are found and nothing else, whatever the matching does is what brute force does."""

import argparse
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps

from data_prep.duplicates import hamming, hashing, search
from data_prep.duplicates.exclusions import ExclusionError, exclusion_text, read_exclusions
from data_prep.duplicates.hamming import TooManyPairs, near_pairs, near_pairs_within
from data_prep.duplicates.hashing import DuplicateError
from data_prep.duplicates.search import find_within
from data_prep.ledger import LEDGER_NAME, SCHEMA
from data_prep.manifest import Manifest, ShardEntry, ShardIndex, Split, file_sha256, index_path

WNIDS = ("n02084071", "n02121620", "n02958343")
FLAT_COLOURS = (30, 128, 220)


def scene(seed: int, side: int = 224) -> Image.Image:
    """A picture with the spectrum of photos (smooth in the large, noisy in the small) and some shapes."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((side, side, 3))
    for cells in (4, 8, 16, 32, 64):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), dtype=float) * 3 / cells
    image = Image.fromarray(np.clip(picture * 0.6, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, w, h = (int(v) for v in rng.integers(10, side // 2, 4))
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x, y, x + w, y + h), fill=colour)
    return image


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def flat(value: int, side: int = 64, quality: int = 90) -> bytes:
    return jpeg(Image.new("RGB", (side, side), (value, value, value)), quality)


Images = dict[tuple[str, str], bytes]  # (wnid, name) -> JPEG


def write_data_set(folder: Path, splits: dict[str, Images], per_shard: int = 100) -> Path:
    """A data set folder as the `shard` command writes it."""
    folder.mkdir()
    built = {}
    for split, images in splits.items():
        rows = list(images.items())
        entries = []
        for number, start in enumerate(range(0, len(rows), per_shard)):
            path = folder / f"{split}-{number:06d}.tar"
            keys, offsets, sizes, labels = [], [], [], []
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for (wnid, name), data in rows[start : start + per_shard]:
                    key, label = f"{wnid}_{Path(name).stem}", WNIDS.index(wnid)
                    described = {"wnid": wnid, "label": label, "source_name": name, "bytes": len(data)}
                    for extension, content in (("jpg", data), ("json", json.dumps(described).encode())):
                        info = tarfile.TarInfo(f"{key}.{extension}")
                        info.size = len(content)
                        if extension == "jpg":
                            offsets.append(tar.offset + tarfile.BLOCKSIZE)
                        tar.addfile(info, io.BytesIO(content))
                    keys.append(key)
                    sizes.append(len(data))
                    labels.append(label)
            ShardIndex(np.array(keys), np.array(offsets), np.array(sizes), np.array(labels)).save(index_path(path))
            entries.append(
                ShardEntry(file=path.name, samples=len(keys), bytes=path.stat().st_size, sha256=file_sha256(path))
            )
        counts = [sum(wnid == wanted for wnid, _ in images) for wanted in WNIDS]
        built[split] = Split(samples=len(rows), class_counts=counts, shards=entries)
    data_id = hashlib.sha256("".join(e.sha256 for s in built.values() for e in s.shards).encode()).hexdigest()[:32]
    Manifest(name=folder.name, dataset_id=data_id, synsets=list(WNIDS), splits=built).save(folder)
    return folder


def write_ledger(folder: Path, split: str, digests: dict[str, tuple[str, str]]) -> None:
    """key -> (shard, SHA-256 of the source)."""
    rows = [
        {"wnid": key[:9], "split": split, "key": key, "shard": shard, "sha256": sha256, "action": "kept"}
        for key, (shard, sha256) in digests.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / LEDGER_NAME)


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    search.add_arguments(parser)
    return search.run(parser.parse_args([*map(str, arguments), "--workers", "1"]))


def pairs_of(output: Path) -> dict[tuple[str, str, str], tuple[str, int]]:
    """(scope, name of a, name of b) -> (kind, distance)."""
    rows = pq.read_table(output / "pairs.parquet").to_pylist()
    found = {(row["scope"], row["a_name"], row["b_name"]): (row["kind"], row["distance"]) for row in rows}
    assert len(found) == len(rows), "each pair once"
    return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train with 300 unlike pictures, copies of some of them and of some of val's, and flat ones; val with 40."""
    folder = tmp_path_factory.mktemp("planted")
    train: Images = {(WNIDS[i % 3], f"own_{i:03d}.JPEG"): jpeg(scene(i)) for i in range(300)}
    val: Images = {(WNIDS[i % 3], f"val_{i:02d}.JPEG"): jpeg(scene(1000 + i)) for i in range(40)}
    big = scene(1003)
    train |= {
        (WNIDS[1], "leak_identical.JPEG"): val[WNIDS[1], "val_01.JPEG"],
        (WNIDS[2], "leak_encoded.JPEG"): jpeg(scene(1002), quality=40),
        (WNIDS[0], "leak_resized.JPEG"): jpeg(big.resize((131, 131), Image.Resampling.BILINEAR)),
        (WNIDS[1], "leak_mirrored.JPEG"): jpeg(ImageOps.mirror(scene(1004)), quality=80),
        (WNIDS[0], "leak_other_class.JPEG"): jpeg(scene(1005), quality=75),
        # In the middle of the alphabet: the first by key, own_007 and own_008, are kept.
        (WNIDS[7 % 3], "own_007_again.JPEG"): train[WNIDS[7 % 3], "own_007.JPEG"],
        (WNIDS[8 % 3], "own_008_small.JPEG"): jpeg(scene(8).resize((120, 120))),
        (WNIDS[8 % 3], "own_008_worse.JPEG"): jpeg(scene(8), quality=35),
        # Unlike in bytes, without content: near to one another, and no duplicates.
        **{(WNIDS[0], f"plain_{v}_{s}.JPEG"): flat(v, s) for v in FLAT_COLOURS for s in (64, 96)},
        (WNIDS[1], "plain_twice.JPEG"): flat(FLAT_COLOURS[0], 64),
    }
    val[WNIDS[2], "plain_in_val.JPEG"] = flat(90, 80)
    rng = np.random.default_rng(0)
    shuffled = {key: train[key] for key in (list(train)[i] for i in rng.permutation(len(train)))}
    return (
        write_data_set(folder / "small-22k", {"train": shuffled}),
        write_data_set(folder / "small-1k", {"train": {(WNIDS[0], "t.JPEG"): jpeg(scene(0))}, "val": val}),
    )


@pytest.fixture(scope="module")
def report(planted: tuple[Path, Path]) -> Path:
    train, val = planted
    assert command(train, "--against", val, "--within") == 0
    return train / "duplicates"


def test_exactly_the_planted_are_found(report: Path) -> None:
    found = pairs_of(report)
    kinds = {images: kind for images, (kind, _) in found.items()}
    assert kinds == {
        ("against", "leak_identical.JPEG", "val_01.JPEG"): "exact",
        ("against", "leak_encoded.JPEG", "val_02.JPEG"): "near",
        ("against", "leak_resized.JPEG", "val_03.JPEG"): "near",
        ("against", "leak_mirrored.JPEG", "val_04.JPEG"): "mirrored",
        ("against", "leak_other_class.JPEG", "val_05.JPEG"): "near",
        ("within", "own_007_again.JPEG", "own_007.JPEG"): "exact",
        ("within", "own_008_small.JPEG", "own_008.JPEG"): "near",
        ("within", "own_008_worse.JPEG", "own_008.JPEG"): "near",
        ("within", "plain_twice.JPEG", "plain_30_64.JPEG"): "exact",
    }
    assert all(distance <= search.MAX_DISTANCE for _, distance in found.values())


def test_exclusion_list(report: Path) -> None:
    listed = read_exclusions(report / "exclude.txt")
    assert {name for _, name in listed} == {a for _, a, _ in pairs_of(report)}
    assert (WNIDS[2], "leak_encoded.JPEG") in listed
    text = (report / "exclude.txt").read_text()
    assert text.startswith("# images to leave out")
    assert "within 4 bits; 9 images" in text


def test_report_shows_them(report: Path) -> None:
    page = (report / "duplicates.html").read_text()
    assert page.count("src='data:image/jpeg;base64,") == 2 * 9 + 7, "both of each pair, and the flat ones"
    assert "http" not in page, "self-contained"
    assert "Images of train without content: 7" in page
    assert "5 of 41 images of small-1k (val) are in small-22k (train), as 5 of its 315 images." in page
    assert page.count("other class") == 2, "leak_other_class and plain_twice"


def test_report_says_what_it_does_not_show(planted: tuple[Path, Path], tmp_path: Path) -> None:
    train, val = planted
    command(train, "--against", val, "--within", "--output", tmp_path, "--show", 5)
    page = (tmp_path / "duplicates.html").read_text()
    assert page.count("<div class='pair'><div>") == 5
    assert "Not shown: " in page
    assert len(pairs_of(tmp_path)) == 9


def test_second_run_hashes_nothing(
    report: Path, planted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train, val = planted
    before = pairs_of(report)
    (report / "hashes" / next((report / "hashes").iterdir()).name).unlink()  # as if killed before the last shard
    hashed = []
    original = hashing.hash_image
    monkeypatch.setattr(hashing, "hash_image", lambda data: hashed.append(1) or original(data))
    command(train, "--against", val, "--within")
    assert 0 < len(hashed) <= 100, "one shard"
    hashed.clear()
    command(train, "--against", val, "--within")
    assert not hashed
    assert pairs_of(report) == before


def test_slight_crops_are_found_only_with_a_larger_distance(tmp_path: Path) -> None:
    # What pHash cannot do is told in the help; this holds the size of it.
    pictures = [scene(i) for i in range(20)]
    cut = [picture.crop((2, 2, 222, 222)) for picture in pictures]
    hashes = [
        np.array([hashing.hash_image(jpeg(image)).plain for image in images], np.uint64) for images in (pictures, cut)
    ]
    distance = np.bitwise_count(hashes[0] ^ hashes[1])
    assert (distance <= 8).mean() > 0.9
    assert distance.max() < 20


def test_exit_code_on_leak(planted: tuple[Path, Path], tmp_path: Path) -> None:
    train, val = planted
    assert command(train, "--against", val, "--fail-on-leak", "--output", tmp_path) == 3
    assert command(train, "--within", "--fail-on-leak", "--output", tmp_path) == 0


def test_source_bytes_of_the_ledgers_count_as_exact(tmp_path: Path) -> None:
    # The same source image, stored at two sizes: near by its hash, exact by the ledgers; and a flat one.
    small = {
        (WNIDS[0], "x.JPEG"): jpeg(scene(1).resize((100, 100))),
        (WNIDS[0], "flat.JPEG"): flat(9, 32),
        (WNIDS[0], "unlike.JPEG"): jpeg(scene(2)),
    }
    large = {(WNIDS[0], "y.JPEG"): jpeg(scene(1)), (WNIDS[0], "plain.JPEG"): flat(9, 64)}
    train = write_data_set(tmp_path / "a", {"train": small})
    val = write_data_set(tmp_path / "b", {"val": large})
    source = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("picture", "flat", "unlike")}
    shard = "train-000000.tar"
    write_ledger(
        train,
        "train",
        {
            f"{WNIDS[0]}_{key}": (shard, source[of])
            for key, of in (("x", "picture"), ("flat", "flat"), ("unlike", "unlike"))
        },
    )
    assert command(train, "--against", val) == 0
    assert pairs_of(train / "duplicates")["against", "x.JPEG", "y.JPEG"][0] == "near"
    shard = "val-000000.tar"
    write_ledger(
        val, "val", {f"{WNIDS[0]}_y": (shard, source["picture"]), f"{WNIDS[0]}_plain": (shard, source["flat"])}
    )
    assert command(train, "--against", val) == 0
    assert pairs_of(train / "duplicates") == {
        ("against", "x.JPEG", "y.JPEG"): ("exact", 0),
        ("against", "flat.JPEG", "plain.JPEG"): ("exact", 0),
    }


def test_remote_data_set(tmp_path: Path) -> None:
    import fsspec

    images = {(WNIDS[i % 3], f"{i}.JPEG"): jpeg(scene(i)) for i in range(6)}
    local = write_data_set(tmp_path / "a", {"train": images, "val": {(WNIDS[0], "v.JPEG"): jpeg(scene(3), 60)}})
    memory = fsspec.filesystem("memory")
    memory.put(str(local), "/duplicates-test", recursive=True)
    url = "memory://duplicates-test"
    with pytest.raises(DuplicateError, match="--output"):
        command(url, "--against", url)
    assert command(url, "--against", url, "--output", tmp_path / "report") == 0
    assert list(pairs_of(tmp_path / "report")) == [("against", "3.JPEG", "v.JPEG")]


def test_undecodable_and_wrong_calls(tmp_path: Path) -> None:
    images = {(WNIDS[0], "broken.JPEG"): b"\xff\xd8 no image", (WNIDS[0], "good.JPEG"): jpeg(scene(1))}
    train = write_data_set(tmp_path / "a", {"train": images})
    with pytest.raises(DuplicateError, match="--against VAL, --within"):
        command(train)
    with pytest.raises(DuplicateError, match="compared with itself"):
        command(train, "--against", train)
    with pytest.raises(DuplicateError, match=r"not in 0\.\.16"):
        command(train, "--within", "--max-distance", 40)
    assert command(train, "--within") == 0
    assert "1 of them cannot be decoded" in (train / "duplicates" / "duplicates.html").read_text()


class Fake:
    """Hashed images without files: hashes alone, keys in their order."""

    def __init__(self, plain: list[int], flat_ones: tuple[int, ...] = ()):
        self.plain = np.array(plain, np.uint64)
        self.flat = np.isin(np.arange(len(plain)), flat_ones)
        self.digest = np.arange(len(plain), dtype=np.uint64)

    def rows(self, numbers: np.ndarray) -> dict[int, hashing.ImageRow]:
        return {int(n): hashing.ImageRow(f"{n:09d}", WNIDS[0], str(n), bytes([n % 256]), "f", 0, 0) for n in numbers}


def test_groups_keep_the_first_and_are_not_chained() -> None:
    # 0 - 3 - 15 differ by 2 bits each, 0 and 15 by 4: with 2, only 3 goes; 15 is too far from what is kept.
    pairs, _ = find_within(Fake([0, 0b11, 0b1111]), 2)  # type: ignore[arg-type]
    assert [(pair.a, pair.b, pair.distance) for pair in pairs] == [(1, 0, 2)]


def test_a_large_group_makes_no_square_of_pairs() -> None:
    alike = Fake([7] * 20_000 + [(1 << 64) - 1])
    pairs, _ = find_within(alike, 4)  # type: ignore[arg-type]
    assert len(pairs) == 19_999
    assert {pair.b for pair in pairs} == {0}
    flat_ones = Fake([7] * 20_000, flat_ones=tuple(range(20_000)))
    assert find_within(flat_ones, 4)[0] == []  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), max_distance=st.integers(0, 12), bits=st.sampled_from([8, 24, 64]))
def test_matching_is_exact(seed: int, max_distance: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.uint64((1 << bits) - 1)
    a = rng.integers(0, 2**64, rng.integers(1, 120), dtype=np.uint64) & mask
    b = np.concatenate([a[rng.integers(0, len(a), 40)], rng.integers(0, 2**64, 20, dtype=np.uint64) & mask])
    for place in range(40):
        for bit in rng.integers(0, 64, rng.integers(0, max_distance + 3)):
            b[place] ^= np.uint64(1) << np.uint64(bit)
    apart = np.bitwise_count(a[:, None] ^ b[None])
    for found, distances in (
        (near_pairs(a, b, max_distance), apart),
        (
            near_pairs_within(b, max_distance),
            np.where(np.triu(np.ones((60, 60)), 1) > 0, np.bitwise_count(b[:, None] ^ b), 99),
        ),
    ):
        i, j = np.nonzero(distances <= max_distance)
        assert np.array_equal(found[0], i)
        assert np.array_equal(found[1], j)
        assert np.array_equal(found[2], distances[i, j])


def test_matching_crosses_its_blocks_and_stops_at_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming, "_ROWS", 7)
    monkeypatch.setattr(hamming, "_CANDIDATES", 5)
    values = np.array([1, 1, 2, 2, 2, 1 << 50, 3] * 6, np.uint64)
    expected = np.argwhere(np.triu(np.bitwise_count(values[:, None] ^ values) <= 1, 1))
    assert np.array_equal(np.stack(near_pairs_within(values, 1)[:2], axis=1), expected)
    monkeypatch.setattr(hamming, "MAX_PAIRS", 10)
    with pytest.raises(TooManyPairs, match="smaller --max-distance"):
        near_pairs_within(values, 1)


def test_exclusions_are_read_back_and_checked(tmp_path: Path) -> None:
    images = {("n00000001", "a b.JPEG"), ("n00000001", "tab\there.JPEG"), ("n00000002", "ü/#1.JPEG")}
    path = tmp_path / "list.txt"
    path.write_text(exclusion_text(images, ["made by a test"]), encoding="utf-8")
    assert read_exclusions(path) == images
    path.write_text("# comment\n\nn00000001\ta.JPEG\nn1 b.JPEG\n")
    with pytest.raises(ExclusionError, match=r"line 4: 'n1 b\.JPEG'"):
        read_exclusions(path)
    with pytest.raises(ExclusionError, match="does not exist"):
        read_exclusions(tmp_path / "no.txt")
    with pytest.raises(ExclusionError, match="line break"):
        exclusion_text([("n00000001", "a\nb")], [])
