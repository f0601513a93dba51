"""ILSVRC's flat validation set: labels in every form, and what is taken for labels but is none."""

from __future__ import annotations

import gzip
import io
import random
from pathlib import Path

import numpy as np
import pytest

from data_prep.sources.detect import open_source
from data_prep.sources.streams import SourceError
from data_prep.sources.val_labels import load_val_labels
from data_prep.storage import Folder
from tests.support.source_forms import WNIDS, all_chunks, content, items_of, tar_of, truth_of, write, write_tree


def val_set(count: int = 12) -> tuple[dict[str, bytes], list[str]]:
    rng = random.Random(5)
    names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(count)]
    return {name: content(name) for name in names}, [rng.choice(WNIDS) for _ in names]


def devkit(wnids: list[str], ids: dict[str, int]) -> dict[str, bytes]:
    from scipy.io import savemat

    synsets = np.zeros(len(ids), [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O")])
    for row, (wnid, number) in zip(synsets, ids.items(), strict=True):
        row["ILSVRC2012_ID"], row["WNID"], row["words"] = number, wnid, "a word"
    file = io.BytesIO()
    savemat(file, {"synsets": synsets.reshape(-1, 1)})
    numbers = "".join(f"{ids[wnid]}\n" for wnid in wnids)
    return {"data/meta.mat": file.getvalue(), "data/ILSVRC2012_validation_ground_truth.txt": numbers.encode()}


def test_flat_validation_set_with_each_form_of_labels(tmp_path):
    members, wnids = val_set()
    truth = {("val", w, name): data for w, (name, data) in zip(wnids, members.items(), strict=True)}
    kit = devkit(wnids, {"n00000002": 1, "n00000003": 2, "n00000001": 3})
    kit_path = write_tree(tmp_path / "kit", kit)
    rows = [f"{Path(n).stem},{w} 1 2 3 4 {w} 5 6 7 8" for n, w in zip(members, wnids, strict=True)]
    random.Random(0).shuffle(rows)
    forms = [
        write(
            tmp_path / "t12.tar.gz", gzip.compress(tar_of({f"ILSVRC2012_devkit_t12/{n}": d for n, d in kit.items()}))
        ),
        kit_path,
        kit_path / "data" / "ILSVRC2012_validation_ground_truth.txt",  # meta.mat lies beside it
        write(tmp_path / "labels.txt", "\n".join(wnids).encode()),
        write(tmp_path / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *rows]).encode()),
    ]
    sources = [
        write(tmp_path / "ILSVRC2012_img_val.tar", tar_of(members)),
        write(tmp_path / "v.tar.gz", gzip.compress(tar_of({f"val/{n}": d for n, d in members.items()}))),
        write_tree(tmp_path / "val", {**members, ".DS_Store": b""}),
    ]
    for path in sources:
        with pytest.raises(SourceError, match="do not tell the class: give the development kit"):
            open_source(path)
        for labels in forms:
            source = open_source(path, labels=labels)
            assert (source.kind, source.splits, source.split) == ("ilsvrc-val", ("val",), "val")
            assert truth_of(items_of(all_chunks(source, 4000, Folder(tmp_path / "spool")))) == truth
        few = write(tmp_path / "few.txt", "\n".join(wnids[:-1]).encode())
        many = write(tmp_path / "many.txt", "\n".join([*wnids, *wnids]).encode())
        for labels in (few, many):
            with pytest.raises(SourceError, match=r"11 labels|24 labels"):
                all_chunks(open_source(path, labels=labels), 4000, Folder(tmp_path / "spool"))
        assert open_source(path, labels=forms[0]).fingerprint() == open_source(path, labels=forms[3]).fingerprint()
        assert open_source(path, labels=forms[0]).fingerprint() != open_source(path, labels=many).fingerprint()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ILSVRC2012_validation_ground_truth.txt", "490\n361\n", "not the usual order of classes"),
        ("val.txt", "ILSVRC2012_val_00000001.JPEG 65\n", "not the usual order of classes"),
        ("words.txt", "n00000001\ntench\n", "line 2 is 'tench', not a WordNet id"),
        ("a.csv", "ImageId,PredictionString\nILSVRC2012_val_00000002,n00000001 1 2 3 4\n", "every image from 1 to 1"),
        ("b.csv", "ImageId,PredictionString\nx,y\n", "line 2 is 'x,y'"),
        ("empty.txt", "", "is empty: give"),
        ("a.gz", None, "no development kit"),
        ("b.tar", None, "without data/meta.mat"),
        ("missing.txt", None, "does not exist"),
    ],
)
def test_labels_that_are_none(tmp_path, name, text, message):
    if text is not None:
        write(tmp_path / name, text.encode())
    elif name == "a.gz":
        write(tmp_path / name, gzip.compress(b"n00000001"))
    elif name == "b.tar":
        write(tmp_path / name, tar_of({"x": b""}))
    with pytest.raises(SourceError, match=message):
        load_val_labels(tmp_path / name)


@pytest.mark.parametrize(
    "lines", ["filename,label\na.JPEG,n00000001\nb.JPEG,n00000002\n", "wnid\nn00000001\nn00000002\n"]
)
def test_a_header_is_no_label(tmp_path, lines):
    assert load_val_labels(write(tmp_path / "l.csv", lines.encode("utf-8-sig"))).wnids == ["n00000001", "n00000002"]
    with pytest.raises(SourceError, match="line 4 is 'what'"):
        load_val_labels(write(tmp_path / "l.csv", f"{lines}what\n".encode()))
    for encoding in ("utf-16", "utf-16-be"):
        text = lines if encoding == "utf-16" else f"\ufeff{lines}"
        with pytest.raises(SourceError, match="is UTF-16: save it as UTF-8"):
            load_val_labels(write(tmp_path / "l.csv", text.encode(encoding)))
