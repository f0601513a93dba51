"""Label spaces and the maps between them, against the published one."""

import hashlib
import json
from pathlib import Path

import pytest

from data_prep.labels import (
    LabelError,
    imagenet_1k_synsets,
    lemma,
    map_labels,
    published_hornet_22k_synsets,
    winter21_p_synsets,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "label_maps.json").read_text())["in1k_to_published_22k_head"]


def test_published_head_is_winter21_p_and_nine_more():
    synsets = published_hornet_22k_synsets()
    assert len(synsets) == GOLDEN["head_classes"] == 10_459
    assert synsets[:10_450] == winter21_p_synsets() == sorted(synsets[:10_450])
    assert synsets[10_450:] == GOLDEN["appended"]


def test_imagenet_1k_map_equals_the_published_one():
    mapped = map_labels(published_hornet_22k_synsets(), imagenet_1k_synsets())
    index = mapped.source_index
    assert (len(index), index.min(), index.max()) == (GOLDEN["length"], GOLDEN["min"], GOLDEN["max"])
    assert hashlib.sha256(index.astype("<i8").tobytes()).hexdigest() == GOLDEN["sha256_int64_le"]
    assert mapped.unmatched == []


def test_unmatched_classes_are_minus_one_and_named():
    mapped = map_labels(winter21_p_synsets(), imagenet_1k_synsets())
    assert len(mapped.matched) == 991
    assert mapped.unmatched == GOLDEN["appended"]
    assert (mapped.source_index == -1).sum() == 9
    small = map_labels(["n00000002", "n00000001"], ["n00000001", "n00000003", "n00000002"])
    assert small.source_index.tolist() == [1, -1, 0]


@pytest.mark.parametrize("side", ["source", "target"])
def test_duplicates_are_refused(side):
    twice, once = ["n00000001", "n00000001"], ["n00000001"]
    with pytest.raises(LabelError, match=f"{side} label space.*n00000001"):
        map_labels(*((twice, once) if side == "source" else (once, twice)))


def test_lemma():
    assert lemma("n01440764").startswith("tench")
    assert lemma("n99999999") == "n99999999"
