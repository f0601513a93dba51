"""What a built data set of masks or boxes is: `dataset.json` of kind "dense", and one index beside each shard.

    dataset.json              this manifest
    train-000000.tar          shard: of each sample `KEY.jpg`, in a semantic set `KEY.png`, and `KEY.json`
    train-000000.index.npz    where these lie inside the shard, so that readers can seek
    val-000000.tar ...
    ledger.parquet            what became of every image, and of every annotation that was not taken as it is

`KEY.png` of a semantic set: 8 bits a pixel, as large as the image; a label (position in the manifest's `classes`), or
IGNORED. `KEY.json` there: {"image_id", "file_name", "width", "height", "scene": text or null}.

`KEY.json` of an instance set: {"image_id", "file_name", "width", "height", "annotations": [{"id", "label", "bbox": [x,
y, width, height], "area", "iscrowd": 0 or 1, "segmentation": {"size": [height, width], "counts": text}}, ...]}, by
annotation id; `counts` is the compressed RLE of COCO. `segmentation` is null where the source has a box alone. All
coordinates are pixels of `KEY.jpg` as it is stored: no EXIF orientation is to be applied.

Each training shard is a uniform draw of its split; validation stands in the order of image ids. The number of a sample
in its split is its position in the concatenated shards. Images without annotation are among them: they count in
evaluation.

As `manifest.py` this is read by `pipeline`, and imports little.
"""

import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_prep.manifest import (
    DENSE,
    MANIFEST_NAME,
    Manifest,
    ManifestError,
    ShardEntry,
    dataset_folder,
    index_path,
    kind_of,
    read_file,
    read_manifest,
    unreadable,
)
from data_prep.storage import atomic_write

FORMAT_VERSION = 1
IGNORED = 255  # in a mask: a pixel that counts neither in training nor in evaluation
MAX_SEMANTIC_CLASSES = IGNORED  # labels are 8 bits
Task = Literal["semantic", "instance"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DenseSplit(_Frozen):
    """One split. By label: `class_images`, how many images show the class; of an instance set `class_annotations`, how
    many objects (crowds among them); of a semantic set `class_pixels`, how many pixels. The other list is empty.
    """

    samples: int = Field(ge=0)
    class_images: list[int]
    class_annotations: list[int] = []
    class_pixels: list[int] = []
    shards: list[ShardEntry]

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        total = sum(entry.samples for entry in self.shards)
        if total != self.samples:
            raise ValueError(f"the shards hold {total} samples together, samples is {self.samples}")
        if max(self.class_images, default=0) > self.samples:
            raise ValueError(f"class_images has {max(self.class_images)}, there are {self.samples} samples")
        return self


class DenseManifest(_Frozen):
    """The manifest. Position in `classes` is the label; `category_ids[label]` is the number that the source gives the
    class (COCO's 1 to 90, ADE20K's 1 to 150). `dataset_id` hashes content and settings.
    """

    kind: Literal["dense"] = "dense"
    format_version: int = FORMAT_VERSION
    name: str
    dataset_id: str
    task: Task
    classes: list[str]
    category_ids: list[int]
    splits: dict[str, DenseSplit]
    settings: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.category_ids) != len(self.classes):
            raise ValueError(f"{len(self.category_ids)} category_ids, there are {len(self.classes)} classes")
        twice = [number for number, times in Counter(self.category_ids).items() if times > 1]
        if twice:
            raise ValueError(f"category_ids listed twice: {twice[:5]}")
        if self.task == "semantic" and len(self.classes) > MAX_SEMANTIC_CLASSES:
            raise ValueError(f"{len(self.classes)} classes; masks of 8 bits hold {MAX_SEMANTIC_CLASSES}")
        wanted, empty = ("pixels", "annotations") if self.task == "semantic" else ("annotations", "pixels")
        for name, split in self.splits.items():
            for field, length in (("images", None), (wanted, None), (empty, 0)):
                found = len(getattr(split, f"class_{field}"))
                expected = len(self.classes) if length is None else length
                if found != expected:
                    raise ValueError(
                        f"splits.{name}.class_{field} has {found} entries, a {self.task} set of {len(self.classes)} "
                        f"classes has {expected}"
                    )
        return self

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(self, name: str) -> DenseSplit:
        """The split `name`, or a ManifestError that names the splits there are."""
        if name not in self.splits:
            raise ManifestError(
                f"dataset {self.name!r} has no split {name!r}; it has {', '.join(sorted(self.splits)) or 'none'}"
            )
        return self.splits[name]

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read `dataset.json` of a folder or URL. Raises ManifestError when it is missing, invalid, or of images of
        classes.
        """
        path, raw = read_manifest(directory)
        if kind_of(raw) != DENSE:
            is_other = isinstance(raw, dict) and "synsets" in raw
            what = "is a data set of images of classes" if is_other else "is no manifest of a dense data set"
            raise ManifestError(
                f"{path} {what}, and masks or boxes are wanted here: give a folder built by `python -m data_prep "
                "shard-dense`"
            )
        version = raw.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ManifestError(
                f"{path} has format_version {version}, this code reads {FORMAT_VERSION}: update the code"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file as a whole"
            raise ManifestError(
                f"{path} is not a valid manifest: {where}: {first['msg']} "
                f"({error.error_count()} problem(s)): rebuild the dataset with --force"
            ) from None

    def to_bytes(self) -> bytes:
        """The content of `dataset.json`; the same manifest always gives the same bytes."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()

    def save(self, directory: str | Path) -> None:
        """Write `dataset.json` atomically into a local folder."""
        with atomic_write(Path(directory) / MANIFEST_NAME) as file:
            file.write(self.to_bytes())

    def load_index(self, directory: str | Path, shard: ShardEntry, data: bytes | None = None) -> "DenseIndex":
        """The index of one shard, checked against the manifest's count and bytes; `data`: its file, once read. Raises
        ManifestError.
        """
        path = f"{dataset_folder(directory)}/{index_path(shard.file)}"
        index = DenseIndex.load(path) if data is None else DenseIndex.from_bytes(data, path)
        if len(index) != shard.samples:
            raise ManifestError(
                f"{path} lists {len(index)} samples, {MANIFEST_NAME} says {shard.samples} for {shard.file}: "
                "the files are of different builds; rebuild the dataset with --force"
            )
        if index.end() > shard.bytes:
            raise ManifestError(
                f"{path} points past the end of {shard.file} ({shard.bytes} bytes): rebuild with --force"
            )
        if len(index) and bool(index.mask_bytes.all()) != (self.task == "semantic"):
            raise ManifestError(f"{path} is not of a set of the task {self.task}, by its masks: rebuild with --force")
        return index


_OFFSETS = ("image_offset", "image_bytes", "json_offset", "json_bytes", "mask_offset", "mask_bytes")


@dataclass(frozen=True, eq=False)
class DenseIndex:
    """Where the samples of one shard lie, in the shard's order; all arrays are (N,).

    keys str; *_offset int64, the first byte of a member inside the tar; *_bytes int64, its size; both are 0 for masks
    that are not there; width, height int32, pixels of the image as stored.
    """

    keys: np.ndarray
    image_offset: np.ndarray
    image_bytes: np.ndarray
    json_offset: np.ndarray
    json_bytes: np.ndarray
    mask_offset: np.ndarray
    mask_bytes: np.ndarray
    width: np.ndarray
    height: np.ndarray

    def __post_init__(self) -> None:
        types = {"keys": "U", **dict.fromkeys(_OFFSETS, "int64"), "width": "int32", "height": "int32"}
        for name, dtype in types.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name)).astype(dtype))
        shapes = {name: getattr(self, name).shape for name in types}
        if len(set(shapes.values())) != 1 or len(self.keys.shape) != 1:
            raise ManifestError(f"the arrays of a shard index differ in length: {shapes}")
        if len(self) and min(int(getattr(self, name).min()) for name in types if name != "keys") < 0:
            raise ManifestError("a shard index holds a negative offset or size")

    def __len__(self) -> int:
        return self.keys.shape[0]

    def end(self) -> int:
        """The byte after the last member that is listed."""
        parts = ("image", "json", "mask")
        ends = [getattr(self, f"{part}_offset") + getattr(self, f"{part}_bytes") for part in parts]
        return int(np.max(ends, initial=0))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an index file. Raises ManifestError naming the file when it is missing or damaged."""
        try:
            data = read_file(path)
        except FileNotFoundError:
            raise ManifestError(f"shard index {path} is missing: rebuild the dataset with --force") from None
        except Exception as error:  # each store has its own
            raise unreadable(path, error) from None
        return cls.from_bytes(data, path)

    @classmethod
    def from_bytes(cls, data: bytes, path: str | Path) -> Self:
        """The index in the content of the file `path`. Raises ManifestError when it is damaged."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                keys = np.char.decode(arrays["keys"], "ascii") if arrays["keys"].size else arrays["keys"]
                return cls(keys, *(arrays[name] for name in (*_OFFSETS, "width", "height")))
        except Exception as error:  # numpy raises zipfile, zlib, key and value errors for damaged files
            raise ManifestError(f"shard index {path} is damaged ({error}): rebuild the dataset with --force") from None

    def to_bytes(self) -> bytes:
        """The content of an index file; the same index always gives the same bytes."""
        file = io.BytesIO()
        np.savez(
            file,
            allow_pickle=False,
            keys=np.char.encode(self.keys, "ascii") if len(self) else np.empty(0, "S1"),
            **{name: getattr(self, name) for name in (*_OFFSETS, "width", "height")},
        )
        return file.getvalue()

    def save(self, path: str | Path) -> None:
        """Write the index atomically to a local path."""
        with atomic_write(path) as file:
            file.write(self.to_bytes())


def load_set(directory: str | Path) -> Manifest | DenseManifest:
    """The manifest of a data set of either kind. Raises ManifestError."""
    _, raw = read_manifest(directory)
    return DenseManifest.load(directory) if kind_of(raw) == DENSE else Manifest.load(directory)
