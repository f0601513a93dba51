"""One WebDataset tar that somebody else wrote, read to its end: its samples, each with an image and a class.

The tar is read once, from end to end, which gives its checksum, too. (Over a network that is also the faster way: a
jump from header to header costs a request, in which a stream brings several images.)
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data_prep.foreign.classes import (
    IMAGES,
    MAX_CLASS_BYTES,
    MAX_JSON_BYTES,
    NONE,
    class_of_json,
    class_of_text,
    is_of_sample,
    wnid_in,
)
from data_prep.foreign.scan import ForeignError, Scan, digest_of
from data_prep.manifest import ShardIndex, index_path
from data_prep.sources.detect import OTHER_ARCHIVES
from data_prep.sources.inflate import MAGIC
from data_prep.sources.streams import FileRange
from data_prep.sources.tar import Gap, Member, Tar
from data_prep.storage import Folder, file_system
from data_prep.tar_header import BLOCK

TOLD_SAMPLES = 5
READ_BYTES = 8 << 20
LINKS_TO_LINKS = 8
# WebDataset's rule: folder and name up to the first dot; what has no such name belongs to no sample.
MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
PACKED = {magic: name for name, magic in MAGIC.items()} | OTHER_ARCHIVES


@dataclass(frozen=True)
class Accepted:
    """What may be less than whole. unlabelled: samples without an image or a class are left out; unmarked: tars may end
    without the end mark that says that nothing is missing.
    """

    unlabelled: bool = False
    unmarked: bool = False


NOTHING = Accepted()


class _File(NamedTuple):
    """What a member is, and what it says of its sample's class."""

    offset: int
    size: int
    wnid: str = ""
    number: int = -1


@dataclass
class _Sample:
    files: dict[str, _File] = field(default_factory=dict)  # by extension
    extensions: set[str] = field(default_factory=set)  # those of links, too
    broken: str = ""  # a link that leads nowhere

    @property
    def image(self) -> _File | None:
        return next((self.files[extension] for extension in IMAGES if extension in self.files), None)

    def wnid(self, key: str) -> str:
        """The WordNet id that its `.cls`, JSON or key gives; "" for none."""
        told = [self.files[extension].wnid for extension in ("cls", "json") if extension in self.files]
        return next((wnid for wnid in told if wnid), wnid_in(key))

    @property
    def number(self) -> int:
        """The class number that its `.cls` or JSON gives; -1 for none."""
        told = [self.files[extension].number for extension in ("cls", "json") if extension in self.files]
        return next((number for number in told if number >= 0), -1)

    def lacks(self, key: str) -> str:
        """What keeps it from being trained on."""
        has_class = self.wnid(key) or self.number >= 0
        lacks = "no image" if self.image is None else "" if has_class else "no class"
        return lacks and (self.broken or lacks)


class _Hashed(FileRange):
    """Reads a whole file without seeking, and takes its checksum."""

    def __init__(self, path: str, advance: Callable[[int], None]):
        super().__init__(path)
        self.sha256, self._hashed, self._advance = hashlib.sha256(), 0, advance

    def read(self, size: int) -> bytes:
        start = self.position
        data = super().read(size)
        fresh = data[max(0, self._hashed - start) :]  # some was put back
        self.sha256.update(fresh)
        self._hashed += len(fresh)
        self._advance(len(fresh))
        return data

    def skip(self, size: int) -> int:
        left = size
        while left > 0 and (data := self.read(min(left, READ_BYTES))):
            left -= len(data)
        return size - left


def tars_elsewhere(folder: Folder, at: Folder) -> str | None:
    """The folder of the tars, where their indexes are kept in another."""
    return folder.url if folder.url != at.url else None


def scan_tar(
    folder: Folder, name: str, accepted: Accepted = NOTHING, advance: Callable[[int], None] = lambda _: None
) -> Scan:
    """Read a tar to its end. Raises ForeignError where it is damaged, cut short, or has samples of no use."""
    where = folder.join(name)
    with _Hashed(where, advance) as reader:
        start = reader.read(max(map(len, PACKED)))
        reader.unread(start)
        if packed := next((what for magic, what in PACKED.items() if start.startswith(magic)), None):
            raise ForeignError(f"{where} is a {packed} file, in which no sample can be found: unpack it")
        tar = Tar(reader)
        samples = _samples(tar, where)
        while reader.read(READ_BYTES):
            pass
        if reader.error is not None:
            raise ForeignError(f"{reader.error}: copy the tar again")
        if not samples and reader.position < 2 * BLOCK:
            raise ForeignError(f"{where} has {reader.position} bytes, not even a tar's end mark: copy it again")
        if not tar.end_marked and not (accepted.unmarked and samples):
            raise ForeignError(
                f"{where} ends after {reader.position} bytes without a tar's end mark, as one that was cut short does: "
                "copy it again; or, if whoever wrote it left the mark out, accept such with --unmarked"
            )
        about = {"bytes": reader.position, "sha256": reader.sha256.hexdigest()}
        about |= {} if tar.end_marked else {"unmarked": True}
    lacking = [(key, lacks) for key, sample in samples.items() if (lacks := sample.lacks(key))]
    if lacking and not accepted.unlabelled:
        if len(lacking) == len(samples):
            raise ForeignError(f"{where}: {_why_none(*lacking[0], samples[lacking[0][0]], len(samples))}")
        told = ", ".join(f"{key!r} ({lacks})" for key, lacks in lacking[:TOLD_SAMPLES])
        raise ForeignError(
            f"{where}: {len(lacking):,} of {len(samples):,} samples have no image or no class: {told}"
            f"{', ...' if len(lacking) > TOLD_SAMPLES else ''}: --skip-unlabelled leaves such out"
        )
    odd = next((key for key in samples if not key.isascii()), None)
    if odd is not None:
        raise ForeignError(f"{where}: key {odd!r} is not ASCII: write the tar again with plain names")
    left_out = {key for key, _ in lacking}
    return _scan({key: sample for key, sample in samples.items() if key not in left_out}, about, len(lacking))


def _scan(samples: dict[str, _Sample], about: dict[str, object], left_out: int) -> Scan:
    told = [sample.wnid(key) for key, sample in samples.items()]
    images = [image for sample in samples.values() if (image := sample.image) is not None]
    wnids = sorted(set(told) - {""})
    at = {wnid: number for number, wnid in enumerate(wnids)} | {"": -1}
    index = ShardIndex(
        np.array(list(samples), str),
        np.array([image.offset for image in images], np.int64),
        np.array([image.size for image in images], np.int64),
        np.zeros(len(images), np.int32),
    )
    wnid = np.array([at[wnid] for wnid in told], np.int32)
    number = np.array([sample.number for sample in samples.values()], np.int64)
    return Scan(index, wnids, wnid, number, {**about, "left_out": left_out})


def _samples(tar: Tar, where: str) -> dict[str, _Sample]:
    """The samples of a tar by key, in its order. A link counts as the file that it names."""
    samples: dict[str, _Sample] = {}
    files: dict[str, _File] = {}  # by name: what links may lead to
    links: dict[str, str] = {}
    linked: list[tuple[str, str, Member]] = []
    last = ""
    for member in tar:
        if isinstance(member, Gap):
            raise ForeignError(f"{where}: {member}: fetch or make the tar again")
        file = _told(member, tar)
        if member.kind == "link":
            links[_plain(member.name)] = _plain(member.target)
        elif member.kind == "file":
            files[_plain(member.name)] = file
        parts = MEMBER_NAME.fullmatch(member.name)
        if member.kind == "folder" or parts is None or not is_of_sample(member.name):
            continue
        key, extension = parts[1], parts[2].lower()
        sample = samples.setdefault(key, _Sample())
        before = sample.extensions
        if (key != last and before) or extension in before:
            raise ForeignError(
                f"{where}: {member.name!r} at byte {member.offset} is of the key {key!r}, which stands before it with "
                f"{', '.join(sorted(before))}: a key may stand once in a tar, its files next to each other"
            )
        last = key
        before.add(extension)
        if member.kind == "file":
            sample.files[extension] = file
        else:
            linked.append((key, extension, member))
    for key, extension, member in linked:
        name = _plain(member.target)
        for _ in range(LINKS_TO_LINKS):
            name = links.get(name, name)
        if name in files:
            samples[key].files[extension] = files[name]
        elif member.kind == "link":
            samples[key].broken = f"its {extension} is a link to {member.target!r}, which is not in the tar"
        else:
            samples[key].broken = f"its {extension} is no plain file"
    return samples


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _why_none(key: str, lacks: str, sample: _Sample, samples: int) -> str:
    """Of a tar in which no sample can be trained on, by one of them."""
    files = sorted(sample.extensions)
    told = f"{', '.join(files[:TOLD_SAMPLES])}{', ...' if len(files) > TOLD_SAMPLES else ''}"
    rule = (
        f"an image is .{', .'.join(IMAGES)}, a class is a number or a WordNet id in .cls, or a WordNet id in the key "
        "or the .json"
    )
    if any("." in extension for extension in files):
        rule = "a key ends at its first dot: write the tar again with names that have no other"
    return f"none of its {samples:,} samples has an image and a class; {key!r} ({lacks}) holds {told}: {rule}"


def _told(member: Member, tar: Tar) -> _File:
    """What a member is, and what it says of its sample's class."""
    extension = member.name.rpartition(".")[2].lower()
    file = _File(member.data_offset, member.size)
    if member.kind != "file":
        return file
    told = NONE
    if extension == "cls" and member.size <= MAX_CLASS_BYTES:
        told = class_of_text((tar.data() or b"").decode("utf-8", "replace"))
    elif extension == "json" and member.size <= MAX_JSON_BYTES:
        told = class_of_json(tar.data() or b"")
    return file._replace(wnid=told.wnid, number=told.number)


def is_indexed(
    folder: Folder, name: str, size: int, accepted: Accepted, at: Folder, only: Sequence[str] | None = None
) -> bool:
    """Whether a tar has an index of ours, in the folder `at`, that fits and is not older; `only`: of these classes."""
    file = str(index_path(name))
    try:
        scan = Scan.from_bytes(at.read(file))
    except FileNotFoundError:
        return False
    except KeyError:
        raise ForeignError(
            f"{at.join(file)} is there already, and not by this command: finish the `shard` build it is of, or "
            "remove it"
        ) from None
    except Exception:  # numpy raises zipfile, zlib and value errors for damaged files
        return False
    if scan.about["bytes"] != size or (scan.about["left_out"] and not accepted.unlabelled):
        return False
    if scan.about.get("unmarked") and not accepted.unmarked:
        return False
    if scan.about.get("tars") != tars_elsewhere(folder, at):
        return False
    if "of_classes" in scan.about and (only is None or scan.about["of_classes"] != digest_of(only)):
        return False
    try:
        (system, root), (at_system, at_root) = file_system(folder.url), file_system(at.url)
        return bool(at_system.modified(f"{at_root}/{file}") >= system.modified(f"{root}/{name}"))
    except NotImplementedError:  # a store that tells no times
        return True
