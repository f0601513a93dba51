"""The demo pictures: synsets, families, rendering, variants, archives, and what a missing client says."""

from __future__ import annotations

import io
import shutil
import stat
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from timm.data import ImageNetInfo

from data_prep.demo import archive as demo_archive
from data_prep.demo import clipart as demo_clipart
from data_prep.demo import command as demo
from data_prep.demo import icons as demo_icons
from data_prep.demo.archive import DemoError, Picture, write_archive
from data_prep.demo.command import load_rules

RULES = load_rules()
CAR = '<path fill="currentColor" d="M2 12h2l2-5h10l3 5h3v5H2zM6 17a2 2 0 1 0 .1 0zM17 17a2 2 0 1 0 .1 0z"/>'
BELL = '<path fill="currentColor" d="M12 2a6 6 0 0 0-6 6v7l-2 2h16l-2-2V8a6 6 0 0 0-6-6zM10 19h4v2h-4z"/>'


def icon_set(prefix: str, icons: dict[str, str]) -> dict[str, Any]:
    return {
        "prefix": prefix,
        "width": 24,
        "height": 24,
        "icons": {name: {"body": body} for name, body in icons.items()},
    }


def picture(name: str, group: str = "g", wnid: str = "n00000001", value: int = 0) -> Picture:
    return Picture(wnid, name, group, f"jpeg of {name}".encode(), (value, value))


def test_every_synset_is_of_imagenet_22k_with_the_lemma_written_beside_it() -> None:
    info = ImageNetInfo("imagenet22k")
    known = set(info.label_names())
    for part, count in (("icons", 50), ("clipart", demo.SYNSETS_1K)):
        assert len(RULES[part]) == count
        for wnid, entry in RULES[part].items():
            assert wnid in known, f"{wnid} ({entry['lemma']}) is not in ImageNet-22K"
            lemmas = info.label_name_to_description(wnid, detailed=False).split(", ")
            assert entry["lemma"] in lemmas, f"{wnid} is {lemmas}"
    assert len(RULES["icons"].keys() & RULES["clipart"].keys()) >= 10, "transfer needs common synsets"


def test_no_icon_name_is_claimed_by_two_synsets() -> None:
    names = [name for entry in RULES["icons"].values() for name in entry["names"]]
    assert len(names) == len(set(names))


def test_families_do_not_overlap() -> None:
    members = [prefix for family in RULES["families"].values() for prefix in family]
    assert len(members) == len(set(members))
    assert demo_icons.family_of("fa6-solid", RULES["families"]) == demo_icons.family_of("fa-brands", RULES["families"])
    assert demo_icons.family_of("tabler", RULES["families"]) == "tabler"
    # A held-out name must be a family, not a set inside one: else that set would be trained on.
    assert not set(RULES["held_out"]) & (set(members) - set(RULES["families"]))


def test_copyleft_non_commercial_and_logo_sets_are_left_out() -> None:
    collections = {
        "good": {"license": {"spdx": "MIT"}},
        "share-alike": {"license": {"spdx": "CC-BY-SA-4.0"}},
        "non-commercial": {"license": {"spdx": "CC-BY-NC-4.0"}},
        "gpl": {"license": {"spdx": "GPL-3.0"}},
        "unknown": {"license": {"title": "none"}},
        "brands": {"license": {"spdx": "MIT"}, "category": "Logos"},
    }
    assert list(demo_icons.permitted(collections, RULES)) == ["good"]


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("car-24-filled", "car"),
        ("baseline-directions-bus", "directions bus"),
        ("bell-off", "bell off"),
        ("clock-x", "clock x"),
        ("camera-16px", "camera"),
        ("hat-cowboy-duotone", "hat cowboy"),
    ],
)
def test_subject_drops_style_and_nothing_else(name: str, subject: str) -> None:
    assert demo_icons.subject(name) == subject


def test_icons_are_matched_by_subject() -> None:
    animated = BELL.replace("/>", '><animate attributeName="d"/></path>')
    found = demo_icons.matching(
        icon_set("some", {"car": CAR, "car-battery": CAR, "bell": BELL, "bell-off": BELL, "alarm-clock": animated}),
        RULES,
    )
    assert [(icon.wnid, icon.key) for icon in found] == [("n02958343", "some-car"), ("n02824448", "some-bell")]
    # The same name, but a key of a keyboard.
    assert not demo_icons.matching(icon_set("icon-park", {"one-key": CAR}), RULES)
    many = {f"car-{number}": CAR for number in range(20)}
    assert len(demo_icons.matching(icon_set("some", many), RULES)) == demo_icons.PER_SET


def test_rendering_is_deterministic_and_coloured_by_name() -> None:
    first, second = (demo_icons.matching(icon_set(prefix, {"car": CAR}), RULES)[0] for prefix in ("one-set", "two-set"))
    rendered = demo_icons.render(first)
    assert rendered is not None
    assert rendered == demo_icons.render(first)
    other = demo_icons.render(second)
    assert other is not None
    assert other.jpeg != rendered.jpeg
    assert other.hashes == rendered.hashes, "the hash sees the drawing, not our colours"
    image = Image.open(io.BytesIO(rendered.jpeg))
    assert (image.format, image.mode, max(image.size)) == ("JPEG", "RGB", demo_icons.LONGEST_SIDE)
    assert np.ptp(np.asarray(image.convert("L"))) > 60, "foreground and background must be far apart"
    empty = demo_icons.matching(icon_set("some", {"car": "<g/>"}), RULES)[0]
    assert demo_icons.render(empty) is None


def test_train_and_validation_share_no_family_and_no_drawing() -> None:
    pictures = [
        picture("a", "held", value=0b0),
        picture("b", "other", value=0b111),  # 3 bits from a: the same drawing
        picture("c", "other", value=2**40 - 1),
        picture("d", "third", value=2**50 - 1),
    ]
    train, validation = demo_icons.split(pictures, ["held"])
    assert [one.name for one in train] == ["c", "d"]
    assert [one.name for one in validation] == ["a"]


def test_near_agrees_with_counting_bits() -> None:
    rng = np.random.default_rng(0)
    left, right = (rng.integers(0, 2**63, size, dtype=np.uint64) for size in (1100, 37))
    expected = [min((int(x) ^ int(y)).bit_count() for y in right) <= 22 for x in left]
    assert 0 < sum(expected) < len(expected)
    assert demo_archive.near(left, right, 22).tolist() == expected
    assert not demo_archive.near(left, right[:0], 64).any()


def test_archives_have_imagenets_shape_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    pictures = [picture("b"), picture("a"), picture("c", wnid="n00000002")]
    line = write_archive(tmp_path / "x.tar", pictures)
    write_archive(tmp_path / "y.tar", reversed(pictures))
    assert (tmp_path / "x.tar").read_bytes() == (tmp_path / "y.tar").read_bytes()
    assert line.startswith("x.tar: 2 synsets, 3 images (1-2 each)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar", "y.tar"], "no temporary file stays behind"
    with tarfile.open(tmp_path / "x.tar") as outer:
        assert outer.getnames() == ["n00000001.tar", "n00000002.tar"]
        with tarfile.open(fileobj=outer.extractfile("n00000001.tar")) as inner:
            assert inner.getnames() == ["n00000001_a.JPEG", "n00000001_b.JPEG"]
            assert {member.mtime for member in inner} == {0}


@pytest.mark.parametrize(
    ("only", "client", "other"), [("icons", "npm", "--only clipart"), ("clipart", "dpkg", "--only icons")]
)
def test_a_missing_client_is_named_with_both_ways_on(
    only: str, client: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DemoError) as caught:
        demo.build_demo(tmp_path / "raw", only=only, cache=tmp_path / "cache")
    message = str(caught.value)
    assert f"`{client}` is not installed" in message
    assert other in message
    assert other.replace("--only ", "make pretrain ONLY=") in message
    assert "make pretrain SOURCE=" in message
    assert "\n" not in message


def test_a_failing_client_is_quoted_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tmp_path / "bin" / "apt-get"
    client.parent.mkdir()
    client.write_text("#!/bin/sh\n: > openclipart-png_half\necho 'E: Unable to locate package' >&2\nexit 100\n")
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{client.parent}")
    with pytest.raises(DemoError, match=r"Unable to locate package.*apt-get update.*--only icons"):
        demo_clipart.fetch(tmp_path / "cache", "openclipart-png")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cached_package_needs_no_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (tmp_path / "iconify-json-1.2.3.tgz").write_bytes(b"x")
    assert demo_icons.fetch(tmp_path, "1.2.3") == tmp_path / "iconify-json-1.2.3.tgz"


def draw(seed: int, ink: str = "black") -> Image.Image:
    """A random polygon on white, different for each seed."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (96, 80), "white")
    corners = rng.integers(4, 76, (5, 2))
    ImageDraw.Draw(image).polygon([(int(x), int(y)) for x, y in corners], fill=ink)
    return image


def test_clip_art_variants_stay_on_one_side(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    files = {f"animals/birds/kind{chr(97 + seed)}": draw(seed) for seed in range(16)}
    files["animals/birds/mirrored"] = ImageOps.mirror(draw(0))
    files["animals/birds/other_name"] = draw(1, "navy")
    files["animals/birds/kindc_red"] = draw(99)  # a variant by name
    files["animals/birds/contour_bat"] = draw(100)  # taken away again by `not`
    files["animals/birds/copy"] = draw(3)
    files["somewhere/else"] = draw(101)
    for path, image in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{path}.png")
    sources = demo_clipart.find_sources({"oc": folder}, RULES)
    assert {source.wnid for source in sources} == {"n01503061"}
    pictures = demo_clipart.load_all(sources)
    assert len(pictures) == 16 + 3, "the copy is dropped, the bat and the rest are not birds"
    group = {one.name.removeprefix("oc-animals-birds-"): one.group for one in pictures}
    assert group["kinda"] == group["mirrored"]
    assert group["kindb"] == group["other_name"]
    assert group["kindc"] == group["kindc_red"]
    rest, part = demo_clipart.split(pictures, 0.22)
    assert len(rest) + len(part) == len(pictures)
    assert 0.1 < len(part) / len(pictures) < 0.3
    assert not {one.group for one in rest} & {one.group for one in part}
    assert demo_clipart.split(reversed(pictures), 0.22)[1][0] in part
    assert all(max(Image.open(io.BytesIO(one.jpeg)).size) <= demo_clipart.LONGEST_SIDE for one in pictures)


def test_finished_archives_are_kept_and_modes_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def fake(name: str) -> Any:
        def source(cache: Path, rules: dict[str, Any]) -> Any:
            calls.append(name)
            pair = ([picture("a")], [picture("b")])
            if name.endswith("alone"):
                return dict.fromkeys(demo.ARCHIVES, pair), dict.fromkeys(demo.ARCHIVES, f"## {name}\n")
            return pair, f"## {name}\n"

        return source

    monkeypatch.setattr(demo_icons, "fetch", lambda *_: None)
    monkeypatch.setattr(demo_clipart, "fetch_all", lambda *_: None)
    for name in ("icons", "clipart", "icons_alone", "clipart_alone"):
        monkeypatch.setattr(demo, name, fake(name))
    output = tmp_path / "raw"

    def build(**options: Any) -> list[str]:
        calls.clear()
        demo.build_demo(output, cache=tmp_path / "cache", **options)
        return list(calls)

    assert build() == ["icons", "clipart"]
    assert {path.name for path in output.iterdir()} == {
        "demo-22k.tar", "demo-22k-val.tar", "demo-1k.tar", "demo-1k-val.tar", "ATTRIBUTION.md", "demo.json",
    }  # fmt: skip
    text = (output / "ATTRIBUTION.md").read_text()
    assert text.index("## icons") < text.index("## clipart")
    capsys.readouterr()
    assert build() == []
    assert "demo-1k.tar, demo-1k-val.tar: already built" in capsys.readouterr().out
    (output / "demo-1k-val.tar").unlink()
    assert build() == ["clipart"]
    assert build(only="icons") == ["icons_alone"], "archives of the other mode may hold the same pictures"
    assert (output / "ATTRIBUTION.md").read_text().count("## icons_alone") == 1
    assert build(only="icons") == []
    assert build(only="icons", force=True) == ["icons_alone"]
    with pytest.raises(DemoError, match="icons or clipart"):
        build(only="photos")


def test_what_takes_long_is_said_before_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fetching and drawing take minutes on slow machines."""
    told: list[str] = []

    def client(command: list[str], folder: Path, *_: str) -> str:
        told.append(capsys.readouterr().out)
        if command[0] != "dpkg":
            (folder / ("iconify-json-1.tgz" if command[0] == "npm" else f"{command[-1]}_1_all.deb")).touch()
        return ""

    for module in (demo_icons, demo_clipart):
        monkeypatch.setattr(module, "run_client", client)
    demo_icons.fetch(tmp_path, "1")
    with pytest.raises(tarfile.ReadError):
        demo_icons.read_icons(tmp_path / "iconify-json-1.tgz", RULES)
    assert "drawing those of iconify-json-1.tgz" in capsys.readouterr().out
    demo_clipart.collect(tmp_path, RULES)
    assert [line.strip() for line in told] == [
        "icons: fetching @iconify/json by npm, about 100 MB",
        "clip art: fetching openclipart-png by apt-get, about 150 MB",
        "clip art: fetching tuxpaint-stamps-default by apt-get, about 150 MB",
        "clip art: unpacking openclipart-png_1_all.deb and reading its pictures",
        "clip art: unpacking tuxpaint-stamps-default_1_all.deb and reading its pictures",
    ]


def test_real_icons_of_a_few_synsets() -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: the icons come through it")
    try:
        package = demo_icons.fetch(demo.default_cache(), RULES["iconify"])
    except DemoError as error:
        pytest.skip(f"the icon package cannot be fetched here: {error}")
    few = {wnid: RULES["icons"][wnid] for wnid in ("n01503061", "n03467517", "n07730207")}
    rules = {**RULES, "icons": few}
    icons, sets = demo_icons.read_icons(package, rules)
    icons = icons[::2][:120]
    pictures = demo_icons.render_all(icons)
    assert len(pictures) > 0.9 * len(icons)
    assert {one.wnid for one in pictures} == set(few)
    assert pictures == demo_icons.render_all(icons)
    train, validation = demo_icons.split(pictures, RULES["held_out"])
    assert len(train) > 3 * len(validation) > 0
    assert not {one.group for one in train} & {one.group for one in validation}
    copies = demo_archive.near(
        demo_archive.hash_array(train), demo_archive.hash_array(validation), demo_icons.NEAR_BITS
    )
    assert not copies.any()
    licences = {sets[icon.prefix]["license"]["spdx"] for icon in icons}
    assert licences <= set(RULES["licences"])
    text = demo_icons.attribution(pictures, icons, sets, RULES["iconify"])
    assert sets[icons[0].prefix]["author"]["name"] in text
