"""What sections are made of, and types of keys that several of them share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from data_prep.manifest import dataset_folder
from data_prep.storage import user_path


class Section(BaseModel):
    # Deferred: sections are built as parts of Config, and then only where a configuration is loaded.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


def _at_home(path: str | Path) -> Any:
    """`path` with a leading ~ or ~user as the shell reads it; a URL as it is."""
    found = user_path(str(path))
    if found.startswith("~"):
        raise ValueError(f"{found}: there is no home folder of that name; a folder called so is ./{found}")
    return type(path)(found)


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
LocalPath = Annotated[Path, AfterValidator(_at_home)]
LocalText = Annotated[str, Field(min_length=1), AfterValidator(_at_home)]  # a path, among other things
DatasetPath = Annotated[LocalText, AfterValidator(dataset_folder)]
StreamPath = Annotated[str, Field(min_length=1)]


def is_stream_of_urls(path: str) -> bool:
    """Whether a path names shards one by one, as the webdataset library does, and not the folder they lie in."""
    return path.startswith("pipe:") or "::" in path or "{" in path or path.endswith((".tar", ".tar.gz", ".tgz"))
