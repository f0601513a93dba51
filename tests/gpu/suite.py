"""The tests of the suite that have something to say on a GPU: those with the marker `gpu`, by pytest."""

import subprocess
import sys
from collections import defaultdict
from xml.etree import ElementTree

from tests.gpu.timing import Bench
from tests.support.runs import ROOT

MARKER = "mark.gpu"
DRY = "nothing_at_all or cuda"  # the interpreter's quickest, and those that are skipped without a GPU


def run_marked(bench: Bench) -> bool:
    """By file, so that what the other files import need not be there."""
    bench.heading("tests with the marker gpu", "file | tests | failed | skipped | seconds | verdict")
    here = ROOT / "tests" / "gpu"
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARKER in path.read_text()]
    report = bench.work / "suite.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--junitxml", str(report)]
    command += ["-k", f"{DRY}"] if bench.tiny else []
    command += [str(path.relative_to(ROOT)) for path in files if path.parent != here or not bench.tiny]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    counts: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        kinds = {child.tag for child in case}
        count = counts[case.get("classname", "").replace(".", "/") + ".py"]
        for place, more in enumerate(
            (1, bool(kinds & {"failure", "error"}), "skipped" in kinds, float(case.get("time", 0)))
        ):
            count[place] += more
    ran = 0
    for file, (tests, failed, skipped, seconds) in sorted(counts.items()):
        ran += int(tests - skipped)
        numbers = {"tests": int(tests), "failed": int(failed), "skipped": int(skipped), "seconds": seconds}
        bench.row(file=file, **numbers, verdict="WRONG" if failed else "ok")
    right = done.returncode == 0 and ran > 0
    if not right:
        bench.note(done.stdout[-6000:])
    return right
