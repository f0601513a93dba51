"""What options of several commands take: numbers within bounds, shares, places of files."""

import argparse
import os

from data_prep.storage import DataPrepError, is_url


def number(minimum: int, maximum: int | None = None) -> "type[int]":
    """An argparse type: an integer within bounds."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum or (maximum is not None and value > maximum):
            raise argparse.ArgumentTypeError(f"{value} is not in {minimum}..{'' if maximum is None else maximum}")
        return value

    parse.__name__ = "int"  # argparse puts it into "invalid int value"
    return parse  # type: ignore[return-value]  # argparse takes any callable


def share(text: str) -> float:
    """An argparse type: 0.05 or 5%."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value


def place(path: str, option: str) -> str:
    """A URL as it is, a path made absolute: workers may run in another folder."""
    if not path:
        raise DataPrepError(f"{option} is empty: is the variable in your command set?")
    return path if is_url(path) else os.path.abspath(path)
