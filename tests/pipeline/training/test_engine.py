"""The engine on two real ranks at every ZeRO stage, and whether DeepSpeed still has the faults it works around."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.runs import ROOT


def test_every_stage(tmp_path: Path) -> None:
    """Losses and states agree between stages; the EMA is that of one process; a refused step leaves no trace; a state
    set back is the state."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "support" / "programs" / "zero_stages.py")],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("agreed\n")
