"""Where a split's `.beton` is, and whether FFCV can be had: asked before a run, so torch comes with FFCV alone."""

from __future__ import annotations

from pathlib import Path

from data_prep.manifest import Manifest, dataset_folder
from pipeline.data.shards import DataError, check_file


def beton_path(directory: str, manifest: Manifest, split: str) -> Path:
    """The split's `.beton`. Raises DataError where there is none, more than one, or one of another size."""
    betons = manifest.split(split).betons
    if not betons:
        raise DataError(
            f"{directory} has no .beton of split {split!r}: set data.format=webdataset, or build it with "
            f"`python -m data_prep shard ... --format both`"
        )
    if len(betons) > 1:
        raise DataError(f"{directory} has {len(betons)} betons of split {split!r}; one is supported")
    path = Path(dataset_folder(directory)) / betons[0].file
    check_file(path, betons[0].bytes)
    try:
        import ffcv  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"data.format is ffcv, but FFCV is not there ({error}): `make setup` says what it needs; "
            f"or set data.format=webdataset"
        ) from None
    return path
