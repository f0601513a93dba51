"""Faults that a source can have: named, counted, treated as the reference readers and evaluators do; or refused."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.dense.rle import BadSegmentation, encode_segmentation, run_lengths
from data_prep.dense_set import DenseManifest
from tests.support.dense_sources import (
    ade_mask,
    ade_name,
    ade_source,
    coco_json,
    coco_source,
    edit_json,
    jpeg,
    png,
    samples,
    size_of,
    write,
    zipped,
)

WIDTH, HEIGHT = 60, 40


def build(kind: str, source: Path, output: Path, *options: str) -> int:
    fixed = ["--output", str(output), "--workers", "1", "--max-reject", "1", "--samples-per-shard", "5"]
    return main(["shard-dense", f"--{kind}", str(source), *fixed, *options])


def ledger(folder: Path) -> dict[tuple[str, Any, Any], tuple[str, str]]:
    """(split, image id, annotation id) -> (action, reason)."""
    rows = pq.read_table(folder / "ledger.parquet").to_pylist()
    found = {(row["split"], row["image_id"], row["annotation_id"]): (row["action"], row["reason"]) for row in rows}
    assert len(found) == len(rows)
    return found


def annotation(number: int, **changes: Any) -> dict[str, Any]:
    told = {
        "id": number,
        "image_id": 1,
        "category_id": 3,
        "bbox": [5, 6, 10, 8],
        "area": 80,
        "iscrowd": 0,
        "segmentation": [[5, 6, 15, 6, 15, 14, 5, 14]],
        **changes,
    }
    return {name: value for name, value in told.items() if value is not ...}


SIZE = [HEIGHT, WIDTH]
TWO_POINTS = [1, 1, 9, 9]  # in front of others, it makes them boxes
# reason -> what becomes of them in train and in val, and the annotations; "": taken as they are, no row
FAULTY: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "": (
        *("", ""),
        [
            annotation(1),
            annotation(21, bbox=[-3, 30, 70, 20]),  # reaches out of the image, as some of COCO's do
            annotation(22, image_id=2),  # of images that are rejected: these are told
            annotation(23, image_id=4),
        ],
    ),
    "crowd": ("kept", "kept", [annotation(2, iscrowd=1, segmentation={"size": SIZE, "counts": [9, 30, 2361]})]),
    "empty_box": ("dropped", "kept", [annotation(3, bbox=[5, 6, 0, 8]), annotation(4, bbox=[5, 6, 10, -1])]),
    "outside_image": ("dropped", "kept", [annotation(5, bbox=[60, 6, 10, 8])]),
    "no_area": ("dropped", "kept", [annotation(6, area=0), annotation(7, segmentation=[[70, 6, 80, 6, 80, 14]])]),
    "no_segmentation": ("kept", "kept", [annotation(8, segmentation=...), annotation(9, segmentation=[])]),
    "bad_segmentation": (
        *("repaired", "repaired"),
        [
            annotation(10, segmentation=[TWO_POINTS]),
            annotation(12, segmentation=[[1, 1, 1e300, 1, 9, 9]]),
            annotation(13, segmentation={"size": SIZE, "counts": [9, 3]}),
            annotation(14, segmentation={"size": SIZE[::-1], "counts": [2400]}),
        ],
    ),
    "bad_polygon": ("repaired", "repaired", [annotation(11, segmentation=[TWO_POINTS, [1, 1, 9, 1, 9, 9]])]),
    "area_missing": ("repaired", "repaired", [annotation(15, area=...)]),
    "iscrowd_missing": ("repaired", "repaired", [annotation(16, iscrowd=...)]),
    "bad_box": ("dropped", "dropped", [annotation(17, bbox=[1, 2, 3]), annotation(18, bbox=...)]),
    "unknown_category": ("dropped", "dropped", [annotation(19, category_id=4)]),
    "unknown_image": ("dropped", "dropped", [annotation(20, image_id=99)]),
}


def faulty_coco(root: Path) -> Path:
    """Image 1 has every faulty annotation; 2 is missing, 3 has none, 4 is of another size, 5 is cut short, 6 a PNG, 7
    gray, 8 no image, 9 of unknown size, 10 lies on its side by EXIF, 11 too.
    """
    side = Image.Exif()
    side[0x0112] = 6
    files = {
        1: jpeg(WIDTH, HEIGHT, 1),
        3: jpeg(WIDTH, HEIGHT, 3),
        4: jpeg(WIDTH, HEIGHT + 1, 4),
        5: jpeg(WIDTH, HEIGHT, 5)[:-200],
        6: png(np.random.default_rng(6).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)),
        8: b"<html>not found</html>",
        9: jpeg(WIDTH, HEIGHT, 9),
        10: jpeg(WIDTH, HEIGHT, 10, exif=side),
        11: jpeg(WIDTH, HEIGHT, 11, exif=side),
    }
    images = []
    for split in ("train", "val"):
        images = [{"id": n, "file_name": f"{n}.jpg", "width": WIDTH, "height": HEIGHT} for n in range(1, 12)]
        del images[8]["width"], images[8]["height"]
        images[10] |= {"width": HEIGHT, "height": WIDTH}
        for number, data in files.items():
            write(root / f"{split}2017" / f"{number}.jpg", data)
        gray = root / f"{split}2017" / "7.jpg"
        Image.fromarray(np.random.default_rng(7).integers(0, 256, (HEIGHT, WIDTH), np.uint8)).save(gray)
        told = coco_json([each for *_, faulty in FAULTY.values() for each in faulty], images)
        write(root / "annotations" / f"instances_{split}2017.json", json.dumps(told).encode())
    return root


def test_every_fault_of_coco(tmp_path, capsys):
    assert build("coco", faulty_coco(tmp_path / "coco"), tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "note: 5 images of val cannot be used" in shown
    found = ledger(tmp_path / "out")
    no_image = ("html", "undecodable")
    for split, column in (("train", 0), ("val", 1)):
        of_split = {key[1:]: row for key, row in found.items() if key[0] == split}
        for reason, row in FAULTY.items():
            for told in row[2]:
                key = (None if told["image_id"] == 99 else told["image_id"], told["id"])
                assert of_split.get(key, ("", "")) == (row[column], reason), (split, key)
        images = {key[0]: row for key, row in of_split.items() if key[1] is None}
        assert images.pop(8)[1] in no_image
        assert images == {
            1: ("kept", ""),
            2: ("rejected", "missing_image"),
            3: ("kept", "no_annotation"),
            4: ("rejected", "size_differs"),
            5: ("rejected", "truncated"),
            6: ("repaired", "png+no_annotation"),
            7: ("repaired", "gray+no_annotation"),
            9: ("kept", "no_annotation"),
            10: ("kept", "no_annotation"),  # the pixels as they are stored, whatever EXIF says
            11: ("rejected", "size_differs"),
        }
    details = pq.read_table(tmp_path / "out" / "ledger.parquet").to_pylist()
    (turned, _) = [row["detail"] for row in details if row["image_id"] == 11]
    assert turned == "the image has 60 x 40 pixels, its annotations 40 x 60; its EXIF orientation is 6"

    manifest = DenseManifest.load(tmp_path / "out")
    assert manifest.splits["train"].samples == manifest.splits["val"].samples == 6
    kept = {}
    for split in ("train", "val"):
        (first,) = [each for each in samples(tmp_path / "out", manifest, split) if each["json"]["image_id"] == 1]
        kept[split] = {each["id"]: each for each in first["json"]["annotations"]}
    assert list(kept["val"]) == [*range(1, 17), 21], "evaluation counts what nobody can find"
    assert list(kept["train"]) == [1, 2, *range(8, 17), 21]
    assert [number for number, each in kept["train"].items() if each["segmentation"] is None] == [8, 9, 10, 12, 13, 14]
    assert (kept["train"][15]["area"], kept["train"][16]["iscrowd"]) == (80, 0)
    assert kept["train"][21]["bbox"] == [-3, 30, 70, 20]
    assert kept["val"][3]["bbox"] == [5, 6, 0, 8]
    assert kept["train"][2]["iscrowd"] == 1
    assert manifest.splits["train"].class_annotations == [len(kept["train"]), 0, 0]
    assert main(["verify", str(tmp_path / "out"), "--workers", "1"]) == 0


def faulty_ade(root: Path) -> Path:
    ade_source(root, 9, 3)
    images, masks = root / "images" / "training", root / "annotations" / "training"

    def mask(number: int) -> Path:
        return masks / f"{ade_name('train', number)}.png"

    mask(1).unlink()
    (images / f"{ade_name('train', 2)}.jpg").unlink()
    write(mask(3), png(ade_mask("train", 3)[:, 1:]))
    values = ade_mask("train", 4)
    values[:2] = 151
    write(mask(4), png(values))
    write(mask(5), png(np.zeros((*size_of(5)[::-1], 3), np.uint8)))
    write(mask(6), mask(6).read_bytes()[:60])
    write(mask(7), png(np.zeros(size_of(7)[::-1], np.uint8)))
    broken = images / f"{ade_name('train', 8)}.jpg"
    write(broken, broken.read_bytes()[:-300])
    return root


def test_every_fault_of_ade20k(tmp_path):
    assert build("ade20k", faulty_ade(tmp_path / "ade"), tmp_path / "out") == 0
    found = {key[1]: row for key, row in ledger(tmp_path / "out").items() if key[0] == "train"}
    assert found == {
        1: ("rejected", "missing_mask"),
        2: ("rejected", "missing_image"),
        3: ("rejected", "size_differs"),
        4: ("repaired", "values_over_classes"),
        5: ("rejected", "mask_not_8_bit"),
        6: ("rejected", "mask_damaged"),
        7: ("kept", "no_annotation"),
        8: ("rejected", "truncated"),
        9: ("kept", ""),
    }
    manifest = DenseManifest.load(tmp_path / "out")
    by_id = {each["json"]["image_id"]: each for each in samples(tmp_path / "out", manifest, "train")}
    assert sorted(by_id) == [4, 7, 9]
    (tmp_path / "mask.png").write_bytes(by_id[4]["mask"])
    labels = np.array(Image.open(tmp_path / "mask.png"))
    assert (labels[:2] == 255).all()
    assert np.array_equal(labels[2:], ade_mask("train", 4)[2:] - np.uint8(1)), "0 - 1 is 255"
    assert main(["verify", str(tmp_path / "out"), "--workers", "1"]) == 0


def test_too_many_rejects_keep_what_is_done(tmp_path, capsys):
    source = faulty_ade(tmp_path / "ade")
    command = ["shard-dense", "--ade20k", str(source), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main([*command, "--max-reject", "50%"]) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert "6 of 9 images of train cannot be used (66.7%: " in error
    assert "1 missing_mask" in error
    before = (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns
    assert main([*command, "--max-reject", "0.7"]) == 0
    assert (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns == before


def refused(capsys: pytest.CaptureFixture[str], kind: str, source: Path, *options: str) -> str:
    output = source.parent / "out"
    assert build(kind, source, output, *options) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert not output.exists(), "nothing is begun"
    return error


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told["annotations"][0].update(id=0), "annotation id 0: the evaluators take 0 for"),
        (lambda told: told["annotations"][0].update(id=told["annotations"][1]["id"]), "is given twice: number"),
        (lambda told: told["annotations"][0].pop("id"), "has no whole number as id"),
        (lambda told: told["images"][0].update(id=told["images"][1]["id"]), "is given twice"),
        (lambda told: told["images"][0].update(file_name=told["images"][1]["file_name"]), "is given twice (ids "),
        (lambda told: told["categories"].pop(), "other categories than the other split"),
        (lambda told: told["categories"][0].update(id=3), "category id 3 is given twice"),
        (lambda told: told.pop("annotations"), "has no list of annotations"),
    ],
)  # fmt: skip
def test_what_would_mislead_evaluation_is_refused(tmp_path, capsys, change, said):
    source = coco_source(tmp_path / "coco", 5, 4)
    edit_json(source / "annotations" / "instances_val2017.json", change)
    assert said in refused(capsys, "coco", source)


def test_sources_that_are_none(tmp_path, capsys):
    coco, ade = coco_source(tmp_path / "coco", 2, 1), ade_source(tmp_path / "ade", 2, 1)
    assert "has no images/training" in refused(capsys, "ade20k", coco)
    assert "no annotations/instances_train2017.json" in refused(capsys, "coco", ade)
    assert "does not exist" in refused(capsys, "coco", tmp_path / "nowhere")
    assert main(["shard-dense", "--coco", "s3://bucket/coco", "--output", str(tmp_path / "out")]) == 1
    assert "is a URL" in capsys.readouterr().err
    assert build("coco", coco, coco / "out") == 1
    assert "lies inside the source" in capsys.readouterr().err
    (ade / "objectInfo150.txt").write_text("1 wall\n")
    assert "does not begin with the columns Idx and Name" in refused(capsys, "ade20k", ade)
    (coco / "annotations" / "instances_train2017.json").write_text('{"images": [')
    assert "is not readable JSON" in refused(capsys, "coco", coco)
    (coco / "annotations" / "instances_train2014.json").write_text("{}")
    assert "instances_train2014.json and instances_train2017.json" in refused(capsys, "coco", coco)
    archive = tmp_path / "half" / "ADEChallengeData2016.zip"
    write(archive, zipped(coco, tmp_path / "whole.zip", "").read_bytes()[:-100])
    assert "is not a whole zip" in refused(capsys, "ade20k", archive)


def test_a_damaged_member_of_a_zip_is_one_image(tmp_path):
    source = ade_source(tmp_path / "ADEChallengeData2016")
    archive = zipped(source, tmp_path / "ADEChallengeData2016.zip", "ADEChallengeData2016/")
    with zipfile.ZipFile(archive) as opened:
        member = opened.getinfo("ADEChallengeData2016/images/training/ADE_train_00000004.jpg")
    data = bytearray(archive.read_bytes())
    data[member.header_offset + 30 + len(member.filename) + 200] ^= 0xFF
    archive.write_bytes(data)
    assert build("ade20k", archive, tmp_path / "out") == 0
    rejected = [key[1] for key, row in ledger(tmp_path / "out").items() if row[0] == "rejected"]
    assert rejected == [4]


def test_run_lengths_that_cannot_be_of_the_image_never_reach_the_library():
    whole, left_out = encode_segmentation({"size": SIZE, "counts": [0, 2400]}, WIDTH, HEIGHT)
    assert (run_lengths(whole["counts"]), left_out) == ([0, 2400], 0)
    assert encode_segmentation(whole, WIDTH, HEIGHT) == (whole, 0)
    many = encode_segmentation({"size": SIZE, "counts": [100, 50, 1, 1, 1, 3, 2244]}, WIDTH, HEIGHT)[0]
    assert run_lengths(many["counts"]) == [100, 50, 1, 1, 1, 3, 2244]
    for counts in ("", "0", "é", "P", "o", [2401], [-1, 2401], [2400.0], "1" * 90, None, b"x", 5):
        with pytest.raises(BadSegmentation):
            encode_segmentation({"size": SIZE, "counts": counts}, WIDTH, HEIGHT)
    for polygons in (5, [5], ["abcdef"], [[1, 1, 9, 1, 9, float("nan")]], [[True] * 6], [[1, 1, 9, 1, 9, 9, 9]], [[]]):
        with pytest.raises(BadSegmentation):
            encode_segmentation(polygons, WIDTH, HEIGHT)
