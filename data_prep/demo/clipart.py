"""Demo pictures from two Debian packages: tuxpaint-stamps-default and openclipart-png.

Photographs and drawings, sorted into synsets by where they lie in the packages (synsets.yaml). The
packages hold many variants of one picture (mirrored, recoloured, outlined): variants form a group, and a
group lies on one side of a split as a whole.
"""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image, ImageChops, ImageOps

from data_prep.demo.archive import (
    Picture,
    cached_download,
    in_processes,
    jpeg_bytes,
    perceptual_hash,
    require,
    run_client,
    say,
    unit_hash,
)

# Package, and where its pictures lie inside it. The short names are those of synsets.yaml.
PACKAGES = {
    "oc": ("openclipart-png", "usr/share/openclipart/png"),
    "tp": ("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps"),
}
NAMES = {"clipart": "clip art", "scenes": "scenes"}  # what is told at work
LONGEST_SIDE = 256
PER_SYNSET = 120  # there are hundreds of flags
NEAR_BITS = 8  # of 64, for the picture or its mirror image

# Words in a file name that tell variants of one picture apart.
# fmt: off
VARIANT = frozenset([
    "aj", "alt", "black", "blue", "bn", "brown", "bw", "color", "colour", "contour", "dark", "gold", "gray", "green",
    "grey", "left", "light", "mirror", "orange", "outline", "pink", "purple", "red", "right", "seagreen", "simple",
    "small", "white", "yellow",
])
# fmt: on


@dataclass(frozen=True)
class Source:
    """One picture file: its synset, its path inside the packages without the ending ("oc/animals/crow_01")."""

    wnid: str
    path: str
    file: Path


def fetch(cache: Path, package: str, source: str = "clipart", megabytes: int = 150) -> Path:
    """The package's .deb, from the cache or by `apt-get download`."""

    def download(folder: Path) -> None:
        folder.chmod(0o755)  # run by root, apt-get gives the download to another user
        hint = "If the package lists are missing or old, run `apt-get update` as root."
        say(f"{NAMES[source]}: fetching {package} by apt-get, about {megabytes} MB")
        run_client(["apt-get", "download", package], folder, source, hint)

    return cached_download(cache, f"{package}_*.deb", download)


def fetch_all(cache: Path) -> dict[str, Path]:
    """Both packages, by short name; refuses before any download where they could not be unpacked."""
    require("dpkg", "clipart")
    return {short: fetch(cache, package) for short, (package, _) in PACKAGES.items()}


@contextmanager
def unpacked(cache: Path, debs: dict[str, Path], source: str = "clipart") -> Iterator[dict[str, Path]]:
    """The packages' content by the same names, in a folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=cache) as folder:
        folders = {}
        for short, deb in debs.items():
            say(f"{NAMES[source]}: unpacking {deb.name} and reading its pictures")
            folders[short] = Path(folder) / short
            folders[short].mkdir()
            run_client(["dpkg", "-x", str(deb.resolve()), str(folders[short])], Path(folder), source)
        yield folders


def version_of(deb: Path) -> str:
    """The version of a package, from its file's name."""
    return deb.name.split("_")[1].replace("%3a", ":")


def find_sources(folders: dict[str, Path], rules: dict[str, Any]) -> list[Source]:
    """The files of the unpacked packages that belong to exactly one synset, sorted by path."""
    sources: list[Source] = []
    for short, folder in sorted(folders.items()):
        taken: set[str] = set()
        for file in sorted(folder.rglob("*")):  # .png sorts before .svg: many pictures come as both
            if file.suffix not in (".png", ".svg") or not file.is_file():
                continue
            path = f"{short}/{file.relative_to(folder).with_suffix('')}"
            if path in taken:
                continue
            wnids = [
                wnid
                for wnid, entry in rules["clipart"].items()
                if any(fnmatchcase(path, pattern) for pattern in entry["match"])
                and not any(fnmatchcase(path, pattern) for pattern in entry.get("not", ()))
            ]
            if len(wnids) == 1:
                taken.add(path)
                sources.append(Source(wnids[0], path, file))
    chosen = sorted(sources, key=lambda source: unit_hash(source.path))
    counts: Counter[str] = Counter()
    for source in chosen:
        counts[source.wnid] += 1
        if counts[source.wnid] > PER_SYNSET:
            sources.remove(source)
    return sources


def stem(path: str) -> str:
    """The words of a file name without numbers and words of variants: the same for "balloon-red" and "-blue"."""
    words = re.findall(r"[a-z]+", path.rsplit("/", 1)[-1].lower())
    return " ".join(word for word in words if word not in VARIANT) or path


def decoded(source: Source) -> Image.Image | None:
    """The file as RGBA; None where it cannot be read."""
    try:
        with warnings.catch_warnings():
            # A dozen drawings come at 10,000 x 16,000 pixels: not worth the gigabytes.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if source.file.suffix == ".svg":
                png = resvg_py.svg_to_bytes(svg_path=str(source.file), width=LONGEST_SIDE, skip_system_fonts=True)
                return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
            return Image.open(source.file).convert("RGBA")
    except (ValueError, OSError, Image.DecompressionBombWarning, Image.DecompressionBombError):
        return None


def load(source: Source) -> Picture | None:
    """Decode one file onto white, at most LONGEST_SIDE long; None where it cannot be read or shows nothing."""
    image = decoded(source)
    return None if image is None else picture_of(source, image)


def picture_of(source: Source, image: Image.Image) -> Picture | None:
    """The decoded file on white, at most LONGEST_SIDE long; None where it shows nothing."""
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if box := ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox():
        image = ImageOps.expand(image.crop(box), max(image.size) // 32, "white")  # stamps have wide empty borders
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    gray = image.convert("L")
    low, high = gray.getextrema()
    if min(image.size) < 24 or int(high) - int(low) < 16:  # type: ignore[arg-type]
        return None
    hashes = (perceptual_hash(gray), perceptual_hash(ImageOps.mirror(gray)))
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", source.path)  # a dot would end the key of a WebDataset sample
    return Picture(source.wnid, name, stem(source.path), jpeg_bytes(image), hashes)


def load_all(sources: Sequence[Source]) -> list[Picture]:
    """Load the files, drop repeated ones, put variants into groups."""
    return group(distinct(in_processes(load, sources, "clip art")))


def distinct(loaded: Iterable[Picture | None]) -> list[Picture]:
    """The pictures without those that are byte for byte another one: the packages hold some in several folders."""
    pictures: list[Picture] = []
    seen: set[str] = set()
    for picture in loaded:
        if picture is None:
            continue
        digest = hashlib.sha256(picture.jpeg).hexdigest()
        if digest not in seen:
            seen.add(digest)
            pictures.append(picture)
    return pictures


def group(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures with `group` set: near-duplicates and variants by name of one synset share a group.

    Of near-duplicates in different synsets only the first stays: its label is as good as the other's.
    """
    parent = list(range(len(pictures)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    plain = np.array([picture.hashes[0] for picture in pictures], dtype=np.uint64)
    mirrored = np.array([picture.hashes[1] for picture in pictures], dtype=np.uint64)
    dropped: set[int] = set()
    first_of_stem: dict[tuple[str, str], int] = {}
    for index, picture in enumerate(pictures):
        apart = np.minimum(
            np.bitwise_count(plain[:index] ^ plain[index]), np.bitwise_count(mirrored[:index] ^ plain[index])
        )
        close = [int(other) for other in np.flatnonzero(apart <= NEAR_BITS) if int(other) not in dropped]
        if any(pictures[other].wnid != picture.wnid and apart[other] <= NEAR_BITS // 2 for other in close):
            dropped.add(index)
            continue
        close = [other for other in close if pictures[other].wnid == picture.wnid]
        close.append(first_of_stem.setdefault((picture.wnid, picture.group), index))
        for other in close:
            parent[root(index)] = root(other)
    return [
        replace(picture, group=pictures[root(index)].name)
        for index, picture in enumerate(pictures)
        if index not in dropped
    ]


def split(pictures: Iterable[Picture], share: float) -> tuple[list[Picture], list[Picture]]:
    """(the rest, about `share` of each synset's pictures), whole groups, chosen by hash of the group's name."""
    groups: dict[str, dict[str, list[Picture]]] = defaultdict(lambda: defaultdict(list))
    for picture in pictures:
        groups[picture.wnid][picture.group].append(picture)
    rest: list[Picture] = []
    part: list[Picture] = []
    for wnid in sorted(groups):
        total = sum(map(len, groups[wnid].values()))
        taken = 0
        smallest = min(map(len, groups[wnid].values()))
        # By hash of the name; a group that is too large for what is still missing stays on the other side.
        for name in sorted(groups[wnid], key=lambda name: unit_hash(f"{share}/{name}")):
            members = groups[wnid][name]
            # Something of every synset is taken, unless it is all one group.
            first = not taken and len(members) == smallest < total
            if first or taken + len(members) <= share * total + 1:
                taken += len(members)
                part += members
            else:
                rest += members
    return rest, part


def collect(cache: Path, rules: dict[str, Any]) -> tuple[list[Picture], dict[str, str]]:
    """All clip-art pictures, and the version of each package (for the attribution)."""
    debs = fetch_all(cache)
    with unpacked(cache, debs) as folders:
        pictures = load_all(find_sources(picture_folders(folders), rules))
    return pictures, {PACKAGES[short][0]: version_of(deb) for short, deb in debs.items()}


def picture_folders(folders: dict[str, Path]) -> dict[str, Path]:
    """Where the pictures lie in the unpacked packages, by short name."""
    return {short: folders[short] / inside for short, (_, inside) in PACKAGES.items()}


def attribution(pictures: Iterable[Picture], versions: dict[str, str]) -> str:
    """Markdown: the packages, their licences and how many pictures come from each."""
    counts = Counter(picture.name.split("-", 1)[0] for picture in pictures)
    oc, tp = (PACKAGES[short][0] for short in ("oc", "tp"))
    return "\n".join(
        [
            "## Clip art: Debian packages",
            "",
            "Composited onto white, scaled to at most 256 px, saved as JPEG; otherwise unchanged. Authors are named in "
            "the packages: openclipart-png in its files, tuxpaint-stamps in its documentation.",
            "",
            "| package | version | licence | images |",
            "|---|---|---|---|",
            f"| {oc} | {versions[oc]} | public domain (Open Clip Art Library) | {counts['oc']} |",
            f"| {tp} | {versions[tp]} | GPL-2 (Bill Kendrick and the Tux Paint artists) | {counts['tp']} |",
            "",
            "The archives are built on your machine and are not part of this project. Whoever passes on pictures from "
            f"{tp} does so under the GPL, version 2.",
            "",
        ]
    )
