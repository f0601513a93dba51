"""transformers, which a run without its heads can do without: found, or asked for; quiet; told of no backbone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pipeline.config.sections import ConfigError

_NO_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"


def check_transformers(head: str) -> None:
    """Raises ConfigError where the library is not installed. Nothing is imported."""
    if find_spec("transformers") is None:
        raise ConfigError(
            f"model.head {head} needs the package transformers: pip install 'hornet-pretraining[heads]', or set another"
        )


def found_transformers(head: str) -> Any:
    """The library. Raises ConfigError where it is not installed."""
    check_transformers(head)
    return import_module("transformers")


def stand_in(widths: Sequence[int]) -> Any:
    """The configuration of a backbone with maps of these channels, the finest first: the library makes no head without
    one, and it goes away. Its own way to a backbone of timm's (5.24) drops options without a word.
    """
    count = len(widths)
    return found_transformers("").RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=list(widths),
        depths=[1] * count,
        layer_type="basic",
        out_indices=list(range(1, count + 1)),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing but errors is said: that the backbone is not one of those it knows, it is not to."""
    logging = found_transformers("").logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def unchecked() -> Iterator[None]:
    """The library does not look into its tensors, which on the meta device have no values."""
    before = os.environ.get(_NO_CHECKS)
    os.environ[_NO_CHECKS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_CHECKS]
        else:
            os.environ[_NO_CHECKS] = before
