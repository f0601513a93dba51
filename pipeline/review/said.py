"""What result files say, cut to plain numbers and short texts: nothing in them is trusted to be what it should."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

_TEXT_CHARS = 160
_KEYS = 60


def mappings(value: Any, most: int) -> list[dict[str, Any]]:
    """The mappings among the first `most` of a list; none of anything else."""
    return [each for each in value[:most] if isinstance(each, dict)] if isinstance(value, list) else []


def scalars(value: Any) -> dict[str, Any]:
    """The numbers and texts of a mapping; a list as how many it has."""
    if not isinstance(value, dict):
        return {}
    shown: dict[str, Any] = {}
    for key, each in list(value.items())[:_KEYS]:
        if each is None or isinstance(each, bool) or is_number(each):
            shown[str(key)] = each
        elif isinstance(each, str):
            shown[str(key)] = text(each)
        elif isinstance(each, list) and key == "unmatched":
            shown[str(key)] = len(each)
    return shown


def is_number(value: Any) -> bool:
    """A finite one, and no bool."""
    return type(value) in (int, float) and math.isfinite(value)


def number(value: Any) -> Any:
    """The value where it is a finite number, else None."""
    return value if is_number(value) else None


def text(value: Any) -> str:
    """Its beginning; "" for what is no text."""
    return value[:_TEXT_CHARS] if isinstance(value, str) else ""


def file_inside(folder: Path, name: str) -> Path | None:
    """A file of the folder itself: a link or a name that leads out of it is none."""
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
        return path if name and inside and path.is_file() else None
    except (OSError, ValueError):
        return None
