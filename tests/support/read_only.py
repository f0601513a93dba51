"""A place that nothing can be written to, also by root: a bind mount in a mount namespace of its own."""

from __future__ import annotations

import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from tests.support.archives import run

_MOUNT = "mount --make-rprivate / && mount --bind {0} {0} && mount -o remount,ro,bind {0} && "


@lru_cache
def _permitted() -> bool:
    probe = f"{_MOUNT.format('/tmp')} ! touch /tmp/probe-of-a-read-only-mount 2>/dev/null"
    try:
        return subprocess.run(["unshare", "-m", "sh", "-c", probe], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def run_beside(place: Path, module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m module` where `place` is read-only; the test is skipped where no such place can be made."""
    if not _permitted():
        pytest.skip("mount namespaces are not permitted here")
    command = shlex.join([sys.executable, "-m", module, *arguments])
    mounted = _MOUNT.format(shlex.quote(str(place)))
    return run(["unshare", "-m", "sh", "-c", f"{mounted} exec {command}"], **environment)
