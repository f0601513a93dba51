"""Every image ends in the ledger, and the ledger says what became of it: planted dirt against the truth, row by row."""

import hashlib
import random
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from data_prep.ledger import ACTIONS, SCHEMA
from data_prep.manifest import Manifest
from tests.support.archives import WNIDS, archive, class_images, dirt, image_bytes, shard, tar_bytes


def rows_of(folder: Path) -> list[dict]:
    table = pq.read_table(folder / "ledger.parquet")
    assert table.schema.equals(SCHEMA)
    return table.to_pylist()


def stored_bytes(folder: Path) -> dict[str, tuple[str, bytes]]:
    """key -> (shard, JPEG) of every sample in the shards."""
    found = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    found[member.name.removesuffix(".jpg")] = (path.name, tar.extractfile(member).read())
    return found


def test_every_dirt_is_ledgered_as_it_is(tmp_path):
    truth = dirt()
    source = archive(tmp_path / "s.tar", extra={name: data for name, (data, _, _) in truth.items()})
    assert shard(source, tmp_path / "out", "--val-per-class", "1", "--max-reject", "1") == 0
    rows = {(r["wnid"], r["name"]): r for r in rows_of(tmp_path / "out")}
    clean = {(wnid, name): data for wnid in WNIDS for name, data in class_images(wnid, 12).items()}
    planted = {(WNIDS[0], name): data for name, (data, _, _) in truth.items()}
    assert rows.keys() == clean.keys() | planted.keys()
    samples = stored_bytes(tmp_path / "out")
    held_out = Counter(wnid for (wnid, _), row in rows.items() if row["action"] == "held_out")
    assert held_out == dict.fromkeys(WNIDS, 1)
    for (wnid, name), row in rows.items():
        data = (clean | planted)[wnid, name]
        _, action, reason = truth.get(name, (b"", "kept", ""))
        assert row["reason"] == reason, name
        assert row["action"] in (action, "held_out" if action != "rejected" else action), name
        assert (row["bytes_in"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        if action == "rejected":
            assert (row["split"], row["key"], row["shard"], row["bytes_out"], row["width"]) == ("", "", "", None, None)
        else:
            shard_name, jpeg = samples.pop(row["key"])
            assert (row["shard"], row["bytes_out"]) == (shard_name, len(jpeg))
            assert row["split"] == shard_name.split("-")[0] == ("val" if row["action"] == "held_out" else "train")
            assert 0 < min(row["width"], row["height"]) <= 64
            if not reason and max(row["source_width"], row["source_height"]) < 64:
                assert jpeg == data
    assert not samples
    assert all(row["action"] in ACTIONS for row in rows.values())


def test_files_that_are_no_images_are_ledgered_too(tmp_path):
    members = {f"{w}.tar": tar_bytes(class_images(w, 3)) for w in WNIDS}
    members["n00000001.tar"] = tar_bytes({**class_images("n00000001", 3), ".DS_Store": b"x", "sub/._a.JPEG": b"y"})
    (tmp_path / "s.tar").write_bytes(tar_bytes({"README": b"hello", **members}))
    assert shard(tmp_path / "s.tar", tmp_path / "out") == 0
    others = {r["name"]: (r["action"], r["reason"]) for r in rows_of(tmp_path / "out") if r["action"] != "kept"}
    assert len(others) == 3
    assert {action for action, _ in others.values()} == {"rejected"}
    assert others["README"][1] == "no_class"


def test_truncated_images_can_be_kept(tmp_path):
    whole = image_bytes(1, size=(60, 50))
    source = archive(tmp_path / "s.tar", extra={"cut.JPEG": whole[: len(whole) // 2]})
    assert shard(source, tmp_path / "out", "--truncated", "keep") == 0
    row = next(r for r in rows_of(tmp_path / "out") if r["name"] == "cut.JPEG")
    assert (row["action"], row["reason"], row["width"], row["height"]) == ("repaired", "truncated", 60, 50)


def test_mutated_images_are_all_ledgered(tmp_path):
    choose = random.Random(7)
    bases = [image_bytes(1, (90, 70)), image_bytes(2, (40, 40), fmt="PNG"), image_bytes(3, (50, 40), progressive=True)]
    mutated = {}
    for number in range(1000):
        data = bytearray(choose.choice(bases))
        for _ in range(choose.randrange(1, 6)):
            kind, at = choose.randrange(3), choose.randrange(len(data))
            if kind == 0:
                data[at] = choose.randrange(256)
            elif kind == 1:
                del data[at : at + choose.randrange(1, 40)]
            else:
                data[at:at] = choose.randbytes(choose.randrange(1, 40))
            data = data or bytearray(b"\xff")
        mutated[f"{WNIDS[0]}_{number}.JPEG"] = bytes(data)
    (tmp_path / "s.tar").write_bytes(tar_bytes({f"{WNIDS[0]}.tar": tar_bytes(mutated)}))
    assert shard(tmp_path / "s.tar", tmp_path / "out", "--max-reject", "1", "--samples-per-shard", "200") == 0
    rows = rows_of(tmp_path / "out")
    assert {r["name"]: r["sha256"] for r in rows} == {n: hashlib.sha256(d).hexdigest() for n, d in mutated.items()}
    actions = Counter(r["action"] for r in rows)
    assert actions["kept"] + actions["repaired"] == Manifest.load(tmp_path / "out").split("train").samples > 50
    assert actions["rejected"] > 50
    assert all(r["reason"] for r in rows if r["action"] == "rejected")
