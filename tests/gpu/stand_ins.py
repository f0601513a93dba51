"""Parts that fail, hang and work, for test_dry_run.py."""

import subprocess
import time

from tests.gpu.timing import Bench


def works(bench: Bench) -> bool:
    bench.row(what="works")
    return True


def raises(bench: Bench) -> bool:
    bench.row(what="raises")
    raise RuntimeError("as it was asked to")


def hangs(bench: Bench) -> bool:
    """And has a process that would outlive it."""
    child = subprocess.Popen(["sleep", "600"])
    bench.row(what="hangs", child=child.pid)
    time.sleep(600)
    return True
