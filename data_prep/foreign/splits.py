"""Which tars of a folder belong to which split, and what a folder promises to hold."""

import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence

from braceexpand import braceexpand

from data_prep.foreign.scan import ForeignError
from data_prep.shards.info import INFO_NAME
from data_prep.sources.layout import is_hidden
from data_prep.sources.listing import list_folder
from data_prep.storage import Folder

DEFAULT_SPLITS = {"train": ["train*.tar"], "val": ["val*.tar"]}
FOLDERS_LOOKED_INTO = 10
TOLD_FILES = 5
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def split_tars(folder: Folder, names: Iterable[str], splits: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The tars of each split. Braces are expanded, as by webdataset; every name that they give must be there, and every
    pattern that a user gives must fit one. Raises ForeignError.
    """
    there = list(names)
    tars = sorted(name for name in there if name.endswith(".tar") and not name.startswith("."))
    found: dict[str, list[str]] = {}
    missing: list[str] = []
    for split, globs in splits.items():
        patterns = [pattern for glob in globs for part in glob.split("::") for pattern in braceexpand(part)]
        mine: set[str] = set()
        for pattern in patterns:
            fitting = [name for name in tars if name == pattern or fnmatch.fnmatchcase(name, pattern)]
            mine.update(fitting)
            if not fitting:
                missing.append(pattern)
        if mine:
            found[split] = sorted(mine)
    if not found:
        raise ForeignError(_why_none(folder, there, tars, splits))
    if missing and splits is not DEFAULT_SPLITS:
        told = f"{', '.join(missing[:TOLD_FILES])}{', ...' if len(missing) > TOLD_FILES else ''}"
        raise ForeignError(
            f"{folder.url} has no {told} ({len(missing):,} of those that --split names): copy what is missing there, "
            "or name only the tars that are there"
        )
    taken = [name for mine in found.values() for name in mine]
    twice = sorted({name for name in taken if taken.count(name) > 1}) if len(set(taken)) < len(taken) else []
    if twice:
        raise ForeignError(f"{folder.join(twice[0])} belongs to two splits: give --split patterns that keep them apart")
    return found


def promised_samples(folder: Folder, names: Iterable[str], *, all_of_them: bool) -> dict[str, int]:
    """How many samples each tar holds by the folder's `_info.json`; nothing where there is none that tells.

    Raises ForeignError where `all_of_them` are wanted, and it lists tars that are not among `names`.
    """
    there = set(names)
    if INFO_NAME not in there:
        return {}
    found: dict[str, int] = {}
    try:
        for split in json.loads(folder.read(INFO_NAME))["splits"].values():
            found |= dict(zip(map(str, split["filenames"]), map(int, split["shard_lengths"]), strict=True))
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # somebody's file of that name
    missing = sorted(found.keys() - there)
    if missing and all_of_them:
        raise ForeignError(
            f"{folder.join(missing[0])} is listed in {INFO_NAME} and missing ({len(missing):,} of {len(found):,} are): "
            "copy it there; or name those to take with --split"
        )
    return found


def _why_none(folder: Folder, names: list[str], tars: list[str], splits: Mapping[str, Sequence[str]]) -> str:
    if not tars and (why := why_no_tar(folder, names)):
        return why
    there = f"its tars are {tars[0]}, ..." if tars else "it holds no .tar"
    asked = ", ".join(f"{split}={glob}" for split, globs in splits.items() for glob in globs)
    return f"{folder.url} has no tar of {asked}; {there}: say which are which with --split train=GLOB"


def why_no_tar(folder: Folder, names: Iterable[str]) -> str:
    """Where the tars are that a folder of these names lacks, or what they are; "" where nothing tells."""
    packed = sorted(name for name in names if name.lower().endswith(PACKED_TARS))
    if packed:
        return f"{folder.url} holds compressed tars ({packed[0]}, ...), in which no sample can be found: unpack them"
    inside = _folders_of_tars(folder)
    if not inside:
        return ""
    return (
        f"{folder.url} has no tar, they lie in {', '.join(f'{name}/' for name in inside)}: a data set is one folder: "
        "give one of these, or link all into one, by names such as train-000000.tar and val-000000.tar"
    )


def _folders_of_tars(folder: Folder) -> list[str]:
    names = [entry.name for entry in list_folder(folder.url) if entry.kind == "folder" and not is_hidden(entry.name)]
    return [name for name in names[:FOLDERS_LOOKED_INTO] if folder.folder(name).names("*.tar")]
