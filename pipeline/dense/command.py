"""The command `segment`: the options of all training, the check before a launch, the run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pipeline.training.command import add_arguments, carry_out

if TYPE_CHECKING:
    from pipeline.training.task import Kind

__all__ = ["EPILOG", "add_arguments", "command"]

EPILOG = """\
examples
  the data:         python -m data_prep shard-dense --ade20k ADEChallengeData2016 --output data/ade20k
  one process:      python -m pipeline segment configs/demo_segment.yaml
  all GPUs here:    launch/deepspeed.sh segment configs/segment_upernet_hornet_t_gf_ade20k_512.yaml
  from a run:       ... segment CONFIG init.checkpoint=runs/finetune-hornet-l-in1k-384
  other values:     ... segment CONFIG model.head=gn-uper name=my-run
The same command continues an interrupted run. To stop one and lose nothing: `make stop RUN=...`.
RUN/classes.csv has the newest evaluation, class by class.
exit codes: 0 done, 1 error, 2 usage, 75 stopped on request: queue it again."""


def command(options: argparse.Namespace) -> int:
    """The command with its options parsed; returns the exit code. Raises what `run.main` and `preflight` raise."""
    from pipeline.config.dense import SegmentConfig

    def check(*arguments: Any) -> None:
        from pipeline.dense.preflight import preflight

        preflight(*arguments)

    def kind() -> Kind:
        from pipeline.dense.segmentation import SEGMENTATION

        return SEGMENTATION

    return carry_out(options, SegmentConfig, check, kind)
