"""Label spaces and the maps between them, against the published one."""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.labels import report as label_report
from data_prep.labels import spaces as labels
from data_prep.labels.spaces import (
    KNOWN_SPACES,
    TEDDY_BEAR,
    LabelError,
    imagenet_1k_synsets,
    label_space,
    lemma,
    map_labels,
    published_hornet_22k_synsets,
    winter21_p_synsets,
)
from data_prep.manifest import Manifest, ManifestError
from tests.support.runs import ROOT

GOLDEN = json.loads((ROOT / "tests" / "golden" / "label_maps.json").read_text())["in1k_to_published_22k_head"]


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


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    label_report.add_arguments(parser)
    return label_report.run(parser.parse_args(arguments))


def data_set(folder: Path, synsets: list[str]) -> Path:
    folder.mkdir()
    Manifest(name="own", dataset_id="0" * 32, synsets=synsets, splits={}).save(folder)
    return folder


@pytest.mark.parametrize("name", [name for name, space in KNOWN_SPACES.items() if space.timm_file is not None])
def test_known_spaces(name):
    synsets = label_space(name)
    assert len(synsets) == len(set(synsets)) == KNOWN_SPACES[name].classes
    if name != "hornet-22k":
        assert synsets == sorted(synsets)


def test_counts_of_the_releases():
    counts = {name: space.classes for name, space in KNOWN_SPACES.items()}
    assert counts == {
        "fall11": 21_841,
        "winter21": 19_167,
        "fall11-p": 11_221,
        "winter21-p": 10_450,
        "hornet-22k": 10_459,
        "imagenet-12k": 11_821,
        "imagenet-1k": 1_000,
        "imagenet-a": 200,
        "imagenet-r": 200,
    }
    assert set(label_space("winter21-p")) < set(label_space("fall11-p")) < set(label_space("fall11"))


def test_teddy_bear_is_the_one_class_that_fall11_lacks():
    mapped = map_labels(label_space("fall11"), imagenet_1k_synsets())
    assert len(mapped.matched) == 999
    assert mapped.unmatched == [TEDDY_BEAR]
    assert imagenet_1k_synsets().index(TEDDY_BEAR) == 850
    assert mapped.source_index[850] == -1
    # Where Swin Transformer's map22kto1k.txt points instead (line 851: 5564).
    assert lemma(label_space("fall11")[5564]).startswith("chemise")


def test_a_timm_with_other_counts_is_refused(monkeypatch):
    monkeypatch.setattr(labels, "_timm_info_lines", lambda name: ("n00000001", "n00000002"))
    labels._known_space.cache_clear()
    with pytest.raises(LabelError, match=r"imagenet22k_synsets\.txt lists 2 classes, fall11 has 21,841"):
        label_space("fall11")
    labels._known_space.cache_clear()


def test_spaces_read_from_the_data(tmp_path):
    with pytest.raises(LabelError, match=r"winter21 .*no list in timm: give a data set folder"):
        label_space("winter21")
    synsets = ["n00000003", "n00000001"]
    assert label_space(data_set(tmp_path / "own", synsets)) == synsets, "class order, not sorted"
    listed = tmp_path / "list.txt"
    listed.write_text("# my classes\nn00000003\n\n n00000001 \n")
    assert label_space(listed) == synsets
    listed.write_text("n00000003\nteddy\n")
    with pytest.raises(LabelError, match=r"list\.txt line 2: 'teddy'"):
        label_space(listed)
    listed.write_text("\n")
    with pytest.raises(LabelError, match="lists no WordNet id"):
        label_space(listed)
    with pytest.raises(LabelError, match="none of the known label spaces: fall11"):
        label_space("imagenet-2k")
    with pytest.raises(ManifestError, match="holds no"):
        label_space(tmp_path)


def test_command_prints_and_writes_the_map(tmp_path, capsys):
    output = tmp_path / "maps" / "map.json"
    assert command("winter21-p", "imagenet-1k", "--output", str(output)) == 0
    printed = capsys.readouterr().out
    assert "n02108000 EntleBucher" in printed
    assert "n04399382 (teddy bear) of ImageNet-1K is not in winter21-p" in printed
    assert "9,459" in printed
    written = json.loads(output.read_text())
    assert written["sizes"] == {"a": 10_450, "b": 1_000}
    assert written["synsets"] == imagenet_1k_synsets()
    assert [row["wnid"] for row in written["unmatched"]] == GOLDEN["appended"]
    assert written["unmatched"][-1] == {"wnid": TEDDY_BEAR, "lemma": "teddy, teddy bear"}
    a = label_space("winter21-p")
    assert all(i == -1 or a[i] == wnid for i, wnid in zip(written["source_index"], written["synsets"], strict=True))
    command("hornet-22k", "imagenet-1k")
    assert "teddy" not in capsys.readouterr().out


def test_command_lists_and_bounds_what_it_prints(capsys):
    assert command() == command("--list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed and f"{space.classes:,}" in printed for name, space in KNOWN_SPACES.items())
    command("imagenet-1k", "fall11")
    short = capsys.readouterr().out
    assert "more (--all lists them)" in short
    assert len(short.splitlines()) < 80
    command("imagenet-1k", "fall11", "--all")
    assert len(capsys.readouterr().out.splitlines()) > 20_842
    assert command("fall11") == 2
    assert "two label spaces" in capsys.readouterr().err


def test_labels_stay_light():
    # pipeline reads them in every rank, and a text file needs no torch.
    heavy = "{'torch', 'timm', 'rich', 'pyarrow', 'fsspec', 'PIL'} & set(sys.modules)"
    code = f"import sys; from data_prep.labels.spaces import label_space; label_space('fall11'); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("side", ["source", "target"])
def test_duplicates_are_refused(side):
    twice, once = ["n00000001", "n00000001"], ["n00000001"]
    with pytest.raises(LabelError, match=f"{side} label space.*n00000001"):
        map_labels(*((twice, once) if side == "source" else (once, twice)))


def test_lemma():
    assert lemma("n01440764").startswith("tench")
    assert lemma("n99999999") == "n99999999"
