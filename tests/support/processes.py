"""Processes that tests start and watch."""

from collections.abc import Callable

import psutil

Workers = Callable[[], list[psutil.Process]]
