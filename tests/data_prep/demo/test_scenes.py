"""The demo's scenes: exact masks, the same scene for the same key, and both layouts as `shard-dense` reads them."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as reference

from data_prep.__main__ import main
from data_prep.demo import layouts
from data_prep.demo.clipart import Source
from data_prep.demo.command import load_rules
from data_prep.demo.cutouts import cut_out, labels_of, load_scene_rules, write_store
from data_prep.demo.layouts import BACKGROUND, build_scenes, run_lengths, write_layouts
from data_prep.demo.scenes import LEAST_PIXELS, SIDES, SceneTask, compose
from data_prep.dense_set import DenseManifest
from tests.support.dense_sources import samples

CLASSES = ["disk", "box", "ring"]


def drawn(label: int) -> np.ndarray:
    """A red shape, without half-transparent pixels."""
    image = Image.new("RGBA", (90, 70))
    shape = ImageDraw.Draw(image)
    if label == 1:
        shape.rectangle((0, 0, 89, 69), fill=(255, 0, 0))
    else:
        shape.ellipse((0, 0, 89, 69), fill=(255, 0, 0))
    if label == 2:
        shape.ellipse((25, 20, 65, 50), fill=(0, 0, 0, 0))
    return np.asarray(image)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("store")
    blue = np.zeros((150, 210, 3), np.uint8)
    blue[..., 2] = 200
    pictures = [(split, label, CLASSES[label], drawn(label)) for split in ("train", "val") for label in range(3)]
    write_store(folder, [*pictures, ("train", -1, "sea", blue), ("val", -1, "lake", blue)])
    return str(folder)


def test_masks_are_exactly_what_is_seen(store):
    scenes = [compose(SceneTask(store, 0, "train", number, 3)) for number in range(120)]
    counts = np.bincount([len(scene.labels) for scene in scenes])
    assert counts[0] >= 1, "some scenes have nothing in them"
    assert len(counts) > 5
    sizes = {scene.pixels.shape[:2] for scene in scenes}
    assert all(SIDES[0] <= max(size) <= SIDES[1] for size in sizes)
    assert any(side % 2 for size in sizes for side in size)
    assert len({height > width for height, width in sizes}) == 2
    seen = set[int]()
    for scene in scenes:
        together = np.sum(scene.masks, axis=0) if scene.masks else np.zeros(scene.pixels.shape[:2], int)
        assert together.max() <= 1, "a pixel belongs to one object"
        assert all(mask.sum() >= LEAST_PIXELS for mask in scene.masks)
        red = scene.pixels[..., 0]
        assert (red[together == 1] >= 127).all(), "half of the colour, or more, is the object's"
        if len(scene.labels) == 1:
            assert np.array_equal(red >= 128, together == 1)
            seen.add(scene.labels[0])
    assert seen == {0, 1, 2}


def test_a_scene_follows_from_its_key(store):
    def pixels(seed: int, split: str, number: int) -> bytes:
        return compose(SceneTask(store, seed, split, number, 3)).pixels.tobytes()

    keys = [(0, "train", 1), (1, "train", 1), (0, "val", 1), (0, "train", 2)]
    assert [pixels(*key) for key in keys] == [pixels(*key) for key in keys]
    assert len({pixels(*key) for key in keys}) == len(keys)


def test_run_lengths():
    mask = np.array([[1, 0], [1, 1]], bool)
    assert run_lengths(mask) == [0, 2, 1, 1]
    assert run_lengths(~mask) == [2, 1, 1]
    assert run_lengths(np.zeros((2, 3), bool)) == [6]


def test_both_layouts_hold_the_same_scenes(store, tmp_path):
    for name in ("a", "b"):
        write_layouts(tmp_path / name, store, CLASSES, (12, 5), seed=3)
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert len(files) == 12 + 5 + 2 + 1
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    with zipfile.ZipFile(tmp_path / "a" / "ADEChallengeData2016.zip") as archive:
        rows = archive.read("ADEChallengeData2016/objectInfo150.txt").decode().splitlines()
    assert rows[0] == "Idx\tRatio\tTrain\tVal\tName"
    assert [row.split("\t")[-1] for row in rows[1:]] == [*CLASSES, BACKGROUND]
    assert sum(float(row.split("\t")[1]) for row in rows[1:]) == pytest.approx(1, abs=2e-4)

    found = {}
    for kind, source in (("ade20k", "ADEChallengeData2016.zip"), ("coco", "coco")):
        command = ["shard-dense", f"--{kind}", str(tmp_path / "a" / source), "--output", str(tmp_path / kind)]
        assert main([*command, "--workers", "1"]) == 0
        manifest = DenseManifest.load(tmp_path / kind)
        assert manifest.classes == (CLASSES if kind == "coco" else [*CLASSES, BACKGROUND])
        found[kind] = {
            (split, sample["json"]["image_id"]): sample
            for split in ("train", "val")
            for sample in samples(tmp_path / kind, manifest, split)
        }
    assert found["ade20k"].keys() == found["coco"].keys()
    assert len(found["coco"]) == 17
    for key, sample in found["coco"].items():
        other = found["ade20k"][key]
        assert sample["jpeg"] == other["jpeg"]
        assert other["json"]["scene"] == ("sea" if key[0] == "train" else "lake")
        labels = np.full((sample["json"]["height"], sample["json"]["width"]), len(CLASSES), np.uint8)
        for annotation in sample["json"]["annotations"]:
            mask = decoded(annotation["segmentation"])
            assert annotation["area"] == mask.sum()
            x, y, width, height = map(int, annotation["bbox"])
            assert mask[y : y + height, x : x + width].sum() == mask.sum()
            inside = mask[y : y + height, x : x + width]
            assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            labels[mask] = annotation["label"]
        assert np.array_equal(np.array(Image.open(io.BytesIO(other["mask"]))), labels)


def decoded(encoded: dict[str, Any]) -> np.ndarray:
    return reference.decode(encoded).astype(bool)


def test_cut_out_by_alpha_alone(tmp_path):
    file = tmp_path / "a.png"
    canvas = Image.new("RGBA", (300, 200))
    canvas.paste(Image.fromarray(drawn(0)).resize((180, 140)), (60, 30))
    canvas.save(file)
    found = cut_out(Source("n00000001", "oc/a", file))
    assert found is not None
    picture, pixels = found
    assert (picture.wnid, picture.name) == ("n00000001", "oc-a")
    assert pixels is not None
    assert max(pixels.shape[:2]) <= 144
    assert pixels[pixels.shape[0] // 2, 0, 3] >= 128, "no empty border is left"
    Image.fromarray(drawn(0)[..., :3]).save(file)
    found = cut_out(Source("n00000001", "oc/a", file))
    assert found is not None
    assert found[1] is None, "without alpha it has no outline"


def test_each_synset_of_the_clip_art_is_in_one_class():
    rules, scene_rules = load_rules(), load_scene_rules()
    labels = labels_of(rules, scene_rules)
    assert labels.keys() == rules["clipart"].keys()
    told = {rules["clipart"][wnid]["lemma"]: list(scene_rules["classes"])[label] for wnid, label in labels.items()}
    assert (told["insect"], told["apple"], told["truck"]) == ("animal", "food", "vehicle")
    twice = {"animal": [*scene_rules["classes"]["animal"], "car"]}
    with pytest.raises(ValueError, match=r"car must be in one"):
        labels_of(rules, {"classes": scene_rules["classes"] | twice})
    with pytest.raises(ValueError, match=r"car, truck must be in one"):
        labels_of(rules, {"classes": {**scene_rules["classes"], "vehicle": []}})


def test_photographs_of_validation_are_in_no_training_scene():
    for package, told in load_scene_rules()["packages"].items():
        assert told.keys() == {"folder", "megabytes", "licence", "train", "val"}, package
        assert told["train"]
        assert told["val"]
        assert not set(told["train"]) & set(told["val"])


def test_scenes_are_made_once(tmp_path, store, monkeypatch, capsys):
    def prepared(folder: Path, *_: Any) -> dict[str, str]:
        for name in ("pixels.npy", "entries.json"):
            (folder / name).write_bytes((Path(store) / name).read_bytes())
        return {"openclipart-png": "1", "mate-backgrounds": "2"}

    monkeypatch.setattr(layouts, "prepare_store", prepared)
    rules = {"clipart": dict(list(load_rules()["clipart"].items())[:3])}

    def build(**options: Any) -> str:
        build_scenes(tmp_path / "raw", tmp_path / "cache", rules, **{"counts": (3, 2), "seed": 0, **options})
        return capsys.readouterr().out

    scenes = tmp_path / "raw" / "demo-scenes"
    assert "3 + 2 scenes" in build()
    assert sorted(path.name for path in scenes.iterdir()) == [
        *("ADEChallengeData2016.zip", "ATTRIBUTION.md", "coco", "scenes.json")
    ]
    assert "| mate-backgrounds | 2 | GPL-2+" in (scenes / "ATTRIBUTION.md").read_text()
    first = (scenes / "ADEChallengeData2016.zip").read_bytes()
    assert "already built" in build()
    assert "3 + 2 scenes" in build(seed=1)
    assert (scenes / "ADEChallengeData2016.zip").read_bytes() != first
    assert json.loads((scenes / "scenes.json").read_text())["seed"] == 1
    assert "3 + 2 scenes" in build(force=True)
    assert (scenes / "ADEChallengeData2016.zip").read_bytes() == first
    assert not list((tmp_path / "cache").iterdir())
