"""This process among all ranks."""

import os

import pytest

from pipeline.ranks.collectives import own_threads


def test_threads_are_those_that_openmp_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.15 with more threads than OMP_THREAD_LIMIT allows gets gradients of convolution weights wrong."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_THREAD_LIMIT", raising=False)
    assert (own_threads(1), own_threads(3), own_threads(16)) == (8, 2, 1)
    for limit, threads in (("1", 1), ("3", 3), ("64", 8), ("", 8)):
        monkeypatch.setenv("OMP_THREAD_LIMIT", limit)
        assert own_threads(1) == threads
