"""Classes joined by WordNet's tree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation.wordnet import find_wordnet, groups_of, read_nouns

# The form of WordNet 3.0's data.noun, of nine synsets: offset, file, kind, words, pointers.
NOUNS = {
    "n00001740": ("entity", None),
    "n00015388": ("animal", "n00001740"),
    "n02083346": ("canine", "n00015388"),
    "n02084071": ("dog", "n02083346"),
    "n02114100": ("wolf", "n02083346"),
    "n02121620": ("cat", "n00015388"),
    "n00021939": ("artifact", "n00001740"),
    "n02958343": ("car", "n00021939"),
    "n03782006": ("computer_monitor", "n00021939"),
}


def write_nouns(folder: Path) -> Path:
    lines = ["  1 This software and database is being provided to you"]
    for wnid, (word, parent) in NOUNS.items():
        pointers = ["@", parent[1:], "n", "0000"] if parent else []
        others = ["~", "00001930", "n", "0000", "+", "02645007", "v", "0101"]
        count = f"{len(pointers + others) // 4:03d}"
        lines.append(
            " ".join([wnid[1:], "03", "n", "02", word, "0", "other", "0", count, *others, *pointers, "| text"])
        )
    file = folder / "data.noun"
    file.write_text("\n".join(lines) + "\n", encoding="latin-1")
    return file


def test_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nouns(tmp_path)
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    found = find_wordnet()
    assert found == tmp_path / "data.noun"
    nouns = read_nouns(found)
    assert nouns["n03782006"].words == "computer monitor"
    assert nouns["n02084071"].parent == "n02083346"
    synsets = ["n02084071", "n02958343", "n02121620", "n02114100", "n03782006"]
    images = np.array([50, 50, 50, 50, 50])

    def named(most: int) -> list[tuple[str, list[int]]]:
        return [(group.name, sorted(group.classes)) for group in groups_of(synsets, images, nouns, most)]

    assert named(2) == [("animal", [0, 2, 3]), ("artifact", [1, 4])]
    assert named(3) == [("canine", [0, 3]), ("cat", [2]), ("artifact", [1, 4])]
    assert len(named(24)) == 5
    # A class that another is a kind of, and one that WordNet does not know.
    odd = groups_of(["n02083346", "n02084071", "n99999999"], np.array([9, 9, 9]), nouns)
    assert [group.name for group in odd] == ["canine", "dog", "n99999999"]
    # What is small beside the whole stays together, and no class is lost.
    few = groups_of(synsets, np.array([1000, 1, 1000, 1, 1000]), nouns, 4)
    assert sorted(number for group in few for number in group.classes) == list(range(5))


def test_another_wordnet_is_refused(tmp_path: Path) -> None:
    file = write_nouns(tmp_path)
    file.write_text(file.read_text().replace("00001740", "00001741"))
    with pytest.raises(ValueError, match=r"is not of WordNet 3\.0"):
        read_nouns(file)
