"""The command `detect`: the options of all training, the check before a launch, the run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pipeline.training.command import add_arguments, carry_out

if TYPE_CHECKING:
    from pipeline.training.task import Kind

__all__ = ["EPILOG", "add_arguments", "command"]

EPILOG = """\
examples
  the data:         python -m data_prep shard-dense --coco coco --output data/coco
  one process:      python -m pipeline detect configs/demo_detect.yaml
  all GPUs here:    launch/deepspeed.sh detect configs/detect_cascade_mask_rcnn_hornet_l_coco.yaml
  from a run:       ... detect CONFIG init.checkpoint=runs/pretrain-hornet-l-gf-in22k-224
  other values:     ... detect CONFIG model.pyramid=horfpn name=my-run
The same command continues an interrupted run. To stop one and lose nothing: `make stop RUN=...`.
RUN/classes.csv has the newest evaluation, class by class.
exit codes: 0 done, 1 error, 2 usage, 75 stopped on request: queue it again."""


def command(options: argparse.Namespace) -> int:
    """The command with its options parsed; returns the exit code. Raises what `run.main` and `preflight` raise."""
    from pipeline.config.detect import DetectConfig

    def check(*arguments: Any) -> None:
        from pipeline.detection.preflight import preflight

        preflight(*arguments)

    def kind() -> Kind:
        from pipeline.detection.detection import DETECTION

        return DETECTION

    return carry_out(options, DetectConfig, check, kind)
