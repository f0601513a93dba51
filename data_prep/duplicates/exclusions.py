"""Lists of images to leave out, one `wnid<TAB>name` a line: written by `duplicates`, read by `shard`."""

from collections.abc import Iterable
from pathlib import Path

from data_prep.manifest import SYNSET_PATTERN
from data_prep.storage import DataPrepError, open_binary


class ExclusionError(DataPrepError):
    """A list of images to leave out cannot be read."""


def exclusion_text(images: Iterable[tuple[str, str]], comments: Iterable[str]) -> str:
    """The text of a list of (wnid, name), sorted. A name with a line break cannot be listed: ExclusionError."""
    lines = [f"# {comment}" for comment in comments]
    for wnid, name in sorted(set(images)):
        if len(f"{name}.".splitlines()) > 1:
            raise ExclusionError(f"the image {name!r} of {wnid} has a line break in its name: rename it in the source")
        lines.append(f"{wnid}\t{name}")
    return "\n".join(lines) + "\n"


def read_exclusions(path: str | Path) -> set[tuple[str, str]]:
    """The (wnid, name) pairs of a list, local or remote; name is the image's name in the source, inside its class.

    Raises ExclusionError with the number of the first line that is not `wnid<TAB>name`.
    """
    try:
        with open_binary(path) as file:
            lines = file.read().decode("utf-8").splitlines()
    except FileNotFoundError:
        raise ExclusionError(f"the list {path} does not exist") from None
    except UnicodeDecodeError:
        raise ExclusionError(f"the list {path} is not UTF-8 text: one image a line, WordNet id, tab, name") from None
    images = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        wnid, tab, name = line.partition("\t")  # a name may hold tabs, a WordNet id cannot
        if not (tab and name and SYNSET_PATTERN.fullmatch(wnid)):
            raise ExclusionError(f"{path} line {number}: {line[:60]!r} is not a WordNet id, a tab and a name")
        images.add((wnid, name))
    return images
