"""Build the demo archives: real pictures in the shape of ImageNet, from packages every machine can fetch.

    python -m data_prep demo --output data/raw

writes demo-22k.tar and demo-22k-val.tar (50 synsets of rendered icons), demo-1k.tar and demo-1k-val.tar
(24 synsets of clip art: photographs and drawings), and ATTRIBUTION.md. About half of the clip-art synsets are
among the icon synsets too, so that pretraining on the first helps on the second. The pictures come through the
machine's own package clients (npm; apt-get and dpkg); nothing else is downloaded. With --scenes it makes pictures with
masks and boxes from the same clip art (layouts.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from data_prep.demo import clipart as demo_clipart
from data_prep.demo import icons as demo_icons
from data_prep.demo.archive import DemoError, Picture, hash_array, near, say, unit_hash, write_archive
from data_prep.demo.layouts import build_scenes
from data_prep.storage import Folder, number, refuse_unwritable, user_path
from data_prep.writer import sole_writer

ARCHIVES = ("demo-22k", "demo-1k")
SYNSETS_1K = 24
RECIPE = 1  # raise it when the code changes the pictures: archives of an older recipe are built anew
Splits = tuple[list[Picture], list[Picture]]  # train, validation


def load_rules() -> dict[str, Any]:
    """synsets.yaml, and under "digest" what identifies its content."""
    text = resources.files("data_prep.demo").joinpath("synsets.yaml").read_bytes()
    return {**yaml.safe_load(text), "digest": hashlib.sha256(text).hexdigest()[:12]}


def default_cache() -> Path:
    """Where downloaded packages are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hornet-pretraining"


def build_demo(output: Path, only: str | None = None, cache: Path | None = None, force: bool = False) -> None:
    """Write the four demo archives and ATTRIBUTION.md into `output`.

    `only` ("icons" or "clipart") makes both pairs from one source. Archives that are there and were built the
    same way are kept unless `force`.
    """
    if only not in (None, "icons", "clipart"):
        raise DemoError(f"--only takes icons or clipart, not {only!r}")
    rules = load_rules()
    cache = cache or default_cache()
    # Archives of another mode must not stay beside new ones: their pictures may overlap.
    wanted = {
        name: f"{only or source}{' alone' if only else ''}, recipe {RECIPE}, synsets {rules['digest']}"
        for name, source in zip(ARCHIVES, ("icons", "clipart"), strict=True)
    }
    refuse_unwritable(Folder(output), "choose another --output")
    with sole_writer(Folder(output)):
        _build(output, only, cache, rules, wanted, force)


def _build(
    output: Path, only: str | None, cache: Path, rules: dict[str, Any], wanted: dict[str, str], force: bool
) -> None:
    record = output / "demo.json"
    built: dict[str, Any] = json.loads(record.read_text()) if record.is_file() and not force else {}
    missing = [name for name in ARCHIVES if not _is_built(output, name, wanted[name], built)]
    for name in ARCHIVES:
        if name not in missing:
            say(f"{name}.tar, {name}-val.tar: already built in {output}")
    if not missing:
        return
    refuse_unwritable(Folder(cache), "choose another --cache")
    cache.mkdir(parents=True, exist_ok=True)
    # Everything is fetched before anything is rendered: a missing client shows at once.
    if only == "icons" or (not only and "demo-22k" in missing):
        demo_icons.fetch(cache, rules["iconify"])
    if only == "clipart" or (not only and "demo-1k" in missing):
        demo_clipart.fetch_all(cache)
    if only:
        missing = list(ARCHIVES)
        splits, notes = (icons_alone if only == "icons" else clipart_alone)(cache, rules)
    else:
        splits, notes = {}, {}
        for name in missing:
            splits[name], notes[name] = (icons if name == "demo-22k" else clipart)(cache, rules)
    for name in missing:
        train, validation = splits[name]
        for path, pictures in ((f"{name}.tar", train), (f"{name}-val.tar", validation)):
            say(write_archive(output / path, pictures))
        built[name] = {"built": wanted[name], "attribution": notes[name]}
        _write_text(record, json.dumps(built, indent=1, sort_keys=True) + "\n")
    head = "# Where the demo pictures come from\n"
    _write_text(output / "ATTRIBUTION.md", "\n".join([head, *dict.fromkeys(built[n]["attribution"] for n in ARCHIVES)]))
    say(f"authors and licences: {output / 'ATTRIBUTION.md'}")


def _is_built(output: Path, name: str, wanted: str, built: dict[str, Any]) -> bool:
    whole = all((output / f"{name}{part}.tar").is_file() for part in ("", "-val"))
    return whole and built.get(name, {}).get("built") == wanted


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def icons(cache: Path, rules: dict[str, Any]) -> tuple[Splits, str]:
    """demo-22k from the icon sets, split by family; and its attribution."""
    found, sets = demo_icons.read_icons(demo_icons.fetch(cache, rules["iconify"]), rules)
    train, validation = demo_icons.split(demo_icons.render_all(found), rules["held_out"])
    note = demo_icons.attribution([*train, *validation], found, sets, rules["iconify"])
    return (train, validation), note


def clipart(cache: Path, rules: dict[str, Any]) -> tuple[Splits, str]:
    """demo-1k from the clip art, split by group of variants; and its attribution."""
    pictures, versions = demo_clipart.collect(cache, rules)
    return demo_clipart.split(pictures, 0.22), demo_clipart.attribution(pictures, versions)


def icons_alone(cache: Path, rules: dict[str, Any]) -> tuple[dict[str, Splits], dict[str, str]]:
    """Both sets from icons: a third of the families, and the 24 largest synsets of them, are demo-1k."""
    found, sets = demo_icons.read_icons(demo_icons.fetch(cache, rules["iconify"]), rules)
    pictures = demo_icons.render_all(found)
    small = [picture for picture in pictures if unit_hash(f"1k/{picture.group}") < 1 / 3]
    chosen = {wnid for wnid, _ in Counter(picture.wnid for picture in small).most_common(SYNSETS_1K)}
    splits = {
        "demo-22k": demo_icons.split(_without(pictures, small), rules["held_out"]),
        "demo-1k": demo_icons.split([p for p in small if p.wnid in chosen], rules["held_out"]),
    }
    # What demo-1k is judged by must not be in what pretraining has seen.
    train, validation = splits["demo-22k"]
    seen = near(hash_array(train), hash_array(splits["demo-1k"][1]), demo_icons.NEAR_BITS)
    splits["demo-22k"] = ([p for p, known in zip(train, seen, strict=True) if not known], validation)
    used = [picture for pair in splits.values() for side in pair for picture in side]
    return splits, dict.fromkeys(ARCHIVES, demo_icons.attribution(used, found, sets, rules["iconify"]))


def clipart_alone(cache: Path, rules: dict[str, Any]) -> tuple[dict[str, Splits], dict[str, str]]:
    """Both sets from clip art: about two fifths of each synset's groups are demo-1k."""
    pictures, versions = demo_clipart.collect(cache, rules)
    large, small = demo_clipart.split(pictures, 0.4)
    splits = {"demo-22k": demo_clipart.split(large, 0.22), "demo-1k": demo_clipart.split(small, 0.22)}
    return splits, dict.fromkeys(ARCHIVES, demo_clipart.attribution(pictures, versions))


def _without(pictures: Iterable[Picture], others: Iterable[Picture]) -> list[Picture]:
    names = {picture.name for picture in others}
    return [picture for picture in pictures if picture.name not in names]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m data_prep demo`."""
    parser.add_argument("--output", type=user_path, default="data/raw", help="folder for the archives (data/raw)")
    parser.add_argument("--only", choices=("icons", "clipart"), help="make both sets from this one source")
    parser.add_argument(
        "--scenes",
        action="store_true",
        help="make scenes instead: clip art cut out and put on photographs, with exact masks, in OUTPUT/demo-scenes, "
        "in the layouts of ADE20K and COCO, for shard-dense",
    )
    parser.add_argument(
        "--scene-counts", nargs=2, type=number(1), default=(2000, 300), metavar="N", help="train and val (2000 300)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (0)")
    parser.add_argument("--cache", type=user_path, help=f"folder for downloaded packages ({default_cache()})")
    parser.add_argument("--force", action="store_true", help="build again what is already built")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.scenes:
        if args.only:
            raise DemoError("--only is for the demo's archives: leave it out with --scenes")
        cache = Path(args.cache) if args.cache else default_cache()
        counts = (args.scene_counts[0], args.scene_counts[1])
        build_scenes(Path(args.output), cache, load_rules(), counts=counts, seed=args.seed, force=args.force)
        return 0
    build_demo(Path(args.output), only=args.only, cache=args.cache and Path(args.cache), force=args.force)
    return 0
