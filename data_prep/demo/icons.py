"""Demo pictures from icon sets: npm package @iconify/json, rendered with resvg.

An icon belongs to a synset when its name says so (synsets.yaml). Icons are mostly one-coloured
outlines, so each is painted in colours of its own, which depend on its name alone. Train and validation are
split by family of icon sets: variants of one drawing never lie on both sides.
"""

from __future__ import annotations

import colorsys
import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from data_prep.demo.archive import (
    Picture,
    cached_download,
    hash_array,
    in_processes,
    jpeg_bytes,
    near,
    perceptual_hash,
    run_client,
    say,
    unit_hash,
)

PACKAGE = "@iconify/json"
LONGEST_SIDE = 128
PER_SET = 6  # one set brings at most so many drawings of one synset: some hold dozens of variants
PER_SYNSET = 170  # the demo's synsets should not differ too much in size
NEAR_BITS = 6  # of 64: closer pictures are one drawing, whoever published it

# Words in an icon's name that tell its style, not its subject. Numbers are style too ("car-24").
STYLE = re.compile(
    r"\d+(px|dp)?|\d*(baseline|bold|broken|bulk|color|dualtone|duo|duotone|emoji|fa|fill|filled|flat|glyph|icon|light|"
    r"line|linear|monochrome|one|outline|outlined|regular|round|rounded|sharp|solid|standard|stroke|thin|two|twotone|"
    r"three|four|tone|ultralight|variant|v\d|[bflmos]|xl|sm|md|lg|alt|free|remix|left|right)\d*"
)


@dataclass(frozen=True)
class Icon:
    """One icon before rendering."""

    wnid: str
    prefix: str
    name: str
    family: str
    body: str
    box: tuple[float, float, float, float]  # left, top, width, height

    @property
    def key(self) -> str:
        """The name the icon goes by everywhere: its colours and its file name follow from it."""
        return f"{self.prefix}-{self.name}"


def subject(name: str) -> str:
    """The icon's name without words of style: "car-side-24-filled" -> "car side"."""
    return " ".join(word for word in name.lower().split("-") if not STYLE.fullmatch(word))


def fetch(cache: Path, version: str) -> Path:
    """The package's .tgz, from the cache or by `npm pack`."""

    def download(folder: Path) -> None:
        say(f"icons: fetching {PACKAGE} by npm, about 100 MB")
        run_client(["npm", "pack", "--silent", f"{PACKAGE}@{version}"], folder, "icons")

    return cached_download(cache, f"iconify-json-{version}.tgz", download)


def family_of(prefix: str, families: dict[str, list[str]]) -> str:
    """The family a set belongs to; a set in no family is one by itself."""
    return next((family for family, members in families.items() if prefix in members), prefix)


def permitted(collections: dict[str, Any], rules: dict[str, Any]) -> dict[str, Any]:
    """The sets whose licence is on the list and whose subject is not logos or flags."""
    return {
        prefix: info
        for prefix, info in collections.items()
        if info["license"].get("spdx") in rules["licences"]
        and info.get("category") not in rules["categories_left_out"]
        and prefix not in rules["sets_left_out"]
    }


def read_icons(package: Path, rules: dict[str, Any]) -> tuple[list[Icon], dict[str, Any]]:
    """All icons of the package that belong to a synset, sorted; and the permitted sets' descriptions."""
    say(f"icons: reading and drawing those of {package.name}")
    icons: list[Icon] = []
    with tarfile.open(package) as archive:
        described = archive.extractfile("package/collections.json")
        assert described is not None
        sets = permitted(json.load(described), rules)
        for member in archive:
            if not member.name.startswith("package/json/") or Path(member.name).stem not in sets:
                continue
            stream = archive.extractfile(member)
            assert stream is not None
            icons += matching(json.load(stream), rules)
    return sorted(icons, key=lambda icon: (icon.wnid, icon.key)), sets


def matching(icon_set: dict[str, Any], rules: dict[str, Any]) -> list[Icon]:
    """The set's icons that belong to a synset, at most PER_SET of each."""
    wnid_of = {name: wnid for wnid, entry in rules["icons"].items() for name in entry["names"]}
    taken: Counter[str] = Counter()
    icons = []
    prefix = icon_set["prefix"]
    for name in sorted(icon_set["icons"], key=lambda name: (len(name), name)):  # plain names come first
        entry = icon_set["icons"][name]
        wnid = wnid_of.get(subject(name))
        # An animated icon's first frame is often empty.
        if wnid is None or entry.get("hidden") or "<animate" in entry["body"] or taken[wnid] >= PER_SET:
            continue
        if any(fnmatchcase(f"{prefix}-{name}", pattern) for pattern in rules["icons"][wnid].get("not", ())):
            continue
        taken[wnid] += 1
        left, top, width, height = (
            float(entry.get(side, icon_set.get(side, default)))
            for side, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        family = family_of(prefix, rules["families"])
        icons.append(Icon(wnid, prefix, name, family, entry["body"], (left, top, width, height)))
    return icons


def palette(key: str) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Foreground and background for an icon, far apart in lightness, from its name alone."""
    hue, other, dark_side, depth = (unit_hash(f"{key}/{part}") for part in ("hue", "other", "dark", "depth"))
    dark = colorsys.hls_to_rgb(hue, 0.12 + 0.28 * depth, 0.25 + 0.65 * other)
    light = colorsys.hls_to_rgb((hue + 0.25 + 0.5 * other) % 1, 0.9 + 0.1 * depth, 0.5)
    pair = [tuple(round(255 * channel) for channel in colour) for colour in (dark, light)]
    foreground, background = pair if dark_side < 0.9 else pair[::-1]  # a tenth are light on dark
    return foreground, background  # type: ignore[return-value]


def render(icon: Icon) -> Picture | None:
    """Paint one icon; None where the renderer refuses it or nothing is visible."""
    foreground, background = palette(icon.key)
    left, top, width, height = icon.box
    margin = 0.04 + 0.12 * unit_hash(f"{icon.key}/margin")
    side = round(LONGEST_SIDE * (1 - margin))
    body = icon.body.replace("currentColor", "#{:02x}{:02x}{:02x}".format(*foreground))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
    )
    scale = side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size[0], height=size[1], skip_system_fonts=True)
    except ValueError:
        return None
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    alpha = np.asarray(drawing.getchannel("A"))
    if np.count_nonzero(alpha > 64) < 0.01 * alpha.size:
        return None
    # The hash must not depend on our colours: a one-coloured icon is hashed by its shape.
    if "currentColor" in icon.body:
        gray = Image.fromarray(255 - alpha)
    else:
        white = Image.new("RGBA", drawing.size, "white")
        gray = Image.alpha_composite(white, drawing).convert("L")
    # The canvas is not always square, as photographs are not.
    short = round(LONGEST_SIDE * (0.85 + 0.15 * unit_hash(f"{icon.key}/short")))
    tall = unit_hash(f"{icon.key}/tall") < 0.5
    canvas = (max(short, size[0]), LONGEST_SIDE) if tall else (LONGEST_SIDE, max(short, size[1]))
    image = Image.new("RGB", canvas, background)
    image.paste(drawing, ((canvas[0] - drawing.width) // 2, (canvas[1] - drawing.height) // 2), drawing)
    return Picture(icon.wnid, icon.key, icon.family, jpeg_bytes(image), (perceptual_hash(gray),))


def render_all(icons: Sequence[Icon]) -> list[Picture]:
    """Render; of a synset's pictures that look the same within a family keep one, of all at most PER_SYNSET."""
    kept: dict[str, dict[tuple[str, int], Picture]] = defaultdict(dict)
    for picture in in_processes(render, icons, "icons"):
        if picture is not None:
            kept[picture.wnid].setdefault((picture.group, picture.hashes[0]), picture)
    pictures: list[Picture] = []
    for wnid in sorted(kept):
        # by hash, not by name: the alphabet would drop whole sets
        drawn = sorted(kept[wnid].values(), key=lambda picture: unit_hash(picture.name))[:PER_SYNSET]
        pictures += sorted(drawn, key=lambda picture: picture.name)
    return pictures


def split(pictures: Iterable[Picture], held_out: Iterable[str]) -> tuple[list[Picture], list[Picture]]:
    """(train, validation) by family; train pictures that nearly equal a validation picture are dropped."""
    held = set(held_out)
    train: list[Picture] = []
    validation: list[Picture] = []
    for picture in pictures:
        (validation if picture.group in held else train).append(picture)
    copies = near(hash_array(train), hash_array(validation), NEAR_BITS)
    return [picture for picture, copy in zip(train, copies, strict=True) if not copy], validation


def attribution(pictures: Iterable[Picture], icons: Iterable[Icon], sets: dict[str, Any], version: str) -> str:
    """Markdown: which sets are in the archives, by whom, under which licence, how many pictures of each."""
    prefix_of = {icon.key: icon.prefix for icon in icons}
    counts = Counter(prefix_of[picture.name] for picture in pictures)
    lines = [
        f"## Icons: npm package {PACKAGE} {version}",
        "",
        "Rendered to JPEG in colours of our own; otherwise unchanged. Sets under copyleft or non-commercial licences "
        "were left out.",
        "",
        "| set | author | licence | images |",
        "|---|---|---|---|",
    ]
    for prefix in sorted(counts):
        info, author, licence = sets[prefix], sets[prefix]["author"], sets[prefix]["license"]
        by = f"[{author['name']}]({author['url']})" if author.get("url") else author["name"]
        under = f"[{licence['spdx']}]({licence['url']})" if licence.get("url") else licence["spdx"]
        lines.append(f"| {info['name']} (`{prefix}`) | {by} | {under} | {counts[prefix]} |")
    return "\n".join(lines) + "\n"
