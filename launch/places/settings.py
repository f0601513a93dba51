"""Numbers in the environment."""

from __future__ import annotations

from collections.abc import Mapping


class SettingError(ValueError):
    """A variable, or a file that one names, that cannot be meant so; the text says what to change."""


def whole_number(environment: Mapping[str, str], name: str, lowest: int = 1) -> int | None:
    """What variable `name` holds; None where it is not set, or empty. Raises SettingError."""
    text = environment.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text) >= lowest):
        raise SettingError(f"{name}={text}: it has to be a whole number, {lowest} or more")
    return int(text)


def one_line(text: str, but: str) -> str:
    """The first line of what a program said, cut where it is long; `but` where it said nothing."""
    return next((line.strip()[:200] for line in text.splitlines() if line.strip()), but)
