"""A rank that sees its own device alone, for MIG devices: CUDA shows a process the first of those in
CUDA_VISIBLE_DEVICES, and no more.

    python -m launch.places.one_device MODULE [arguments]    as a rank: what `python -m MODULE` runs, on device 0
"""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    """Run the module; it ends this process."""
    number, devices = int(os.environ["LOCAL_RANK"]), os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[number]
    # The host's cores are shared by all of its ranks still: each has its threads by this.
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(len(devices)))
    os.environ["LOCAL_RANK"] = "0"
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
