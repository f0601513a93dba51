"""The classes of validation images that lie in no folder of a class.

Of ILSVRC's, whose names tell their numbers: from the development kit (ILSVRC2012_devkit_t12.tar.gz, or its folder),
from Kaggle's LOC_val_solution.csv, or from a text file of one WordNet id per line in the order of the images. Of any:
from a text file of lines with an image's name and its WordNet id.
"""

import codecs
import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.manifest import SYNSET_PATTERN
from data_prep.sources.inflate import compression_of, open_reader
from data_prep.sources.layout import base_name, clean_name, is_lost_image, reason_to_skip
from data_prep.sources.streams import SourceError
from data_prep.sources.tar import Member, Tar
from data_prep.storage import is_url

GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
MAX_FILE_BYTES = 16 << 20
LABEL_FORMS = (
    "the development kit (ILSVRC2012_devkit_t12.tar.gz), Kaggle's LOC_val_solution.csv, a text file with one WordNet "
    "id per line, in the order of the images, or one with lines of an image's name and its WordNet id"
)
WHAT_TO_GIVE = f"give {LABEL_FORMS}"
# Other columns may follow, such as the boxes of Tiny ImageNet's val_annotations.txt.
_PAIR = re.compile(r"(.+?)(?:\s*,\s*|\s+)(n\d{8})(?:[\s,].*)?")
_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})(?:\.\w+)?", re.IGNORECASE)


def val_number(name: str) -> int | None:
    """`val/ILSVRC2012_val_00000293.JPEG` -> 293; None for another name."""
    found = _IMAGE.fullmatch(base_name(name))
    return int(found[1]) if found else None


class ValLabels:
    """WordNet ids by the images' numbers, which begin with 1; with `names`, by their names instead: a path below the
    source, or the last part of it, with or without extension.
    """

    def __init__(self, wnids: list[str], path: str, names: list[str] | None = None):
        self.wnids = wnids
        self.path = path
        self._names = names
        listed = list(zip(names or (), wnids, strict=False))
        # Where a last part stands for several images it tells none of them.
        last = Counter(base_name(name) for name, _ in listed)
        self._by_name = {base_name(name): wnid for name, wnid in listed if last[base_name(name)] == 1} | dict(listed)
        self._alone = all(count == 1 for count in last.values())

    def __len__(self) -> int:
        return len(self.wnids)

    @property
    def classes(self) -> set[str]:
        """WordNet ids of all images."""
        return set(self.wnids)

    def place(self, name: str, kind: str, size: int) -> tuple[str, str, str]:
        """(WordNet id, name, reason to leave it out) of a file. Raises SourceError for an image without a label."""
        name = clean_name(name)
        if reason := reason_to_skip(name, kind, size):
            return "", name, reason
        if self._names is not None:
            return self._place_by_name(name)
        number = val_number(name)
        if number is None:
            return "", name, "no_class"
        if not 1 <= number <= len(self.wnids):
            raise SourceError(f"{self.path} holds {len(self.wnids)} labels, there is an image {base_name(name)}")
        return self.wnids[number - 1], base_name(name), ""

    def _place_by_name(self, name: str) -> tuple[str, str, str]:
        tried = [name, base_name(name)]
        for key in [*tried, *(key.rpartition(".")[0] for key in tried)]:
            if key in self._by_name:
                return self._by_name[key], base_name(name) if self._alone else name, ""
        if is_lost_image(name, "no_class"):
            raise SourceError(f"{self.path} has no line for the image {name}: add it, or remove the image")
        return "", name, "no_class"

    def check_count(self, images: int, source: str) -> None:
        """Raises SourceError where not every label has its image."""
        if images != len(self.wnids):
            raise SourceError(f"{source} holds {images} validation images, {self.path} has {len(self.wnids)} labels")

    def fingerprint(self) -> str:
        """Of all labels."""
        lines = self.wnids
        if self._names is not None:
            lines = sorted(f"{name}\t{wnid}" for name, wnid in zip(self._names, self.wnids, strict=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load_val_labels(path: str | Path) -> ValLabels:
    """Read labels of any of the forms. Raises SourceError that says what to give instead."""
    path = str(path)
    if not is_url(path) and Path(path).is_dir():
        files = {name: found for name in (GROUND_TRUTH, META) if (found := _find(Path(path), name)) is not None}
        if len(files) < 2:
            raise SourceError(f"{path} is a folder without {META} and {GROUND_TRUTH}: {WHAT_TO_GIVE}")
        return ValLabels(_from_devkit(files[META].read_bytes(), files[GROUND_TRUTH].read_bytes(), path), path)
    compression = compression_of(path)
    with open_reader(path, compression) as reader:
        start = reader.read(512)
        reader.unread(start)
        if b"ustar" in start[257:265]:
            return ValLabels(_from_devkit_archive(Tar(reader), path), path)
        if compression is not None:
            raise SourceError(f"{path} is a compressed file, but no development kit: {WHAT_TO_GIVE}")
        data = reader.read(MAX_FILE_BYTES)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SourceError(f"{path} is UTF-16: save it as UTF-8")
    text = data.decode("utf-8-sig", "replace")
    return _from_text(text, path)


def _find(folder: Path, name: str) -> Path | None:
    places = [folder / name, folder / "data" / name, *folder.glob(f"ILSVRC2012_devkit*/data/{name}")]
    return next((place for place in places if place.is_file()), None)


def _from_devkit_archive(tar: Tar, path: str) -> list[str]:
    files: dict[str, bytes] = {}
    for entry in tar:
        if isinstance(entry, Member) and base_name(entry.name) in (GROUND_TRUTH, META) and entry.size < MAX_FILE_BYTES:
            files[base_name(entry.name)] = tar.data() or b""
    if not (files.get(META) and files.get(GROUND_TRUTH)):
        raise SourceError(f"{path} is a tar without data/{META} and data/{GROUND_TRUTH}, or is damaged: {WHAT_TO_GIVE}")
    return _from_devkit(files[META], files[GROUND_TRUTH], path)


def _from_devkit(meta: bytes, ground_truth: bytes, path: str) -> list[str]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise SourceError(f"reading {path} needs scipy: `pip install scipy`") from None
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True, struct_as_record=False)["synsets"]
        wnids = {int(synset.ILSVRC2012_ID): str(synset.WNID) for synset in synsets}
        return [wnids[int(line)] for line in ground_truth.split()]
    except Exception as error:  # scipy's many, for a damaged file
        raise SourceError(f"{META} or {GROUND_TRUTH} of {path} is damaged: {error!r}: fetch it again") from None


def _from_text(text: str, path: str) -> ValLabels:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise SourceError(f"{path} is empty: {WHAT_TO_GIVE}")
    if lines[0].replace(" ", "").lower().startswith("imageid,"):
        return ValLabels(_from_kaggle(lines, path), path)
    header = len(lines) > 1 and _tells_class(lines[1]) and not any(char.isdigit() for char in lines[0])
    lines = lines[header:]
    if all(line.split()[-1].isdigit() for line in lines) and not _PAIR.fullmatch(lines[0]):
        meta = None if is_url(path) else _find(Path(path).parent, META)
        if meta is not None and all(line.isdigit() for line in lines):
            return ValLabels(_from_devkit(meta.read_bytes(), text.encode(), path), path)
        raise SourceError(
            f"{path} holds numbers, and ILSVRC's numbers are not the usual order of classes (by sorted WordNet id): "
            "give the development kit as a whole (ILSVRC2012_devkit_t12.tar.gz), whose meta.mat says what they mean"
        )
    if _PAIR.fullmatch(lines[0]):
        return _from_pairs(lines, path, 1 + header)
    for number, line in enumerate(lines, 1 + header):
        if not SYNSET_PATTERN.fullmatch(line):
            raise SourceError(
                f"{path} line {number} is {line[:40]!r}, not a WordNet id such as n01440764: {WHAT_TO_GIVE}"
            )
    return ValLabels(lines, path)


def _tells_class(line: str) -> bool:
    return _PAIR.fullmatch(line) is not None or SYNSET_PATTERN.fullmatch(line) is not None


def _from_pairs(lines: list[str], path: str, first: int) -> ValLabels:
    labels: dict[str, str] = {}
    for number, line in enumerate(lines, first):
        found = _PAIR.fullmatch(line)
        if found is None:
            raise SourceError(f"{path} line {number} is {line[:60]!r}, not an image's name and its WordNet id")
        name, wnid = clean_name(found[1]), found[2]
        if labels.setdefault(name, wnid) != wnid:
            raise SourceError(f"{path} line {number} gives {name} another class than a line before: {wnid}")
    return ValLabels(list(labels.values()), path, list(labels))


def _from_kaggle(lines: list[str], path: str) -> list[str]:
    def rows() -> Iterator[tuple[int, str]]:
        for number, row in enumerate(csv.reader(lines[1:]), 2):
            image = val_number(row[0]) if row else None
            wnid = row[1].split()[0] if len(row) > 1 and row[1].split() else ""
            if image is None or not SYNSET_PATTERN.fullmatch(wnid):
                raise SourceError(
                    f"{path} line {number} is {lines[number - 1][:60]!r}, not an image and its WordNet id"
                )
            yield image, wnid

    labels = dict(rows())
    if sorted(labels) != list(range(1, len(labels) + 1)) or len(labels) != len(lines) - 1:
        raise SourceError(f"{path} does not label every image from 1 to {len(lines) - 1} once: fetch it again")
    return [labels[number] for number in range(1, len(labels) + 1)]
