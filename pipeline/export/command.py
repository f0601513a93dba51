"""The command `export`: its options. The work itself, which imports torch, is in `write.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.ranks.lifetime import leaving_by_exception

KINDS = ("timm", "safetensors", "onnx", "exported-program")
EPILOG = """\
examples
  for timm:               python -m pipeline export runs/NAME --to timm
  for ONNX runtimes:      python -m pipeline export runs/NAME --to onnx
  any image size:         python -m pipeline export runs/NAME --to onnx --dynamic-size     (7x7 models)
  filters for 384 px:     python -m pipeline export runs/NAME --to onnx --resolution 384
  half the size:          python -m pipeline export runs/NAME --to onnx --precision fp16
  into MLflow's registry: python -m pipeline export runs/NAME --to timm --register hornet-l-in22k
  to the Hugging Face Hub: python -m pipeline export runs/NAME --to timm --push-to-hub USER/MODEL
Written to RUN/exports/ unless --out says where: all of it, once it gives the net's own logits again, or nothing.
exit codes: 0 done, 1 error, 2 usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a run folder (its newest checkpoint) or a checkpoint folder",
    )
    add("--to", choices=KINDS, required=True, help="what it is for")
    add("--out", type=Path, metavar="DIR", help="the folder to write; default: RUN/exports/STEP-WEIGHTS-KIND")
    add("--weights", choices=("ema", "raw"), help="default: the EMA where there is one")
    add("--precision", choices=("fp32", "fp16"), default="fp32", help="of all but the head, which stays float32")
    add("--data", metavar="DIR", help="compare top-1 on its validation images too: a data set or a folder of images")
    add("--resolution", type=int, metavar="PIXELS", help="side of its images; default: the run's own")
    add("--dynamic-size", action="store_true", help="onnx, exported-program: any height and width of multiples of 32")
    add("--license", default="other", metavar="ID", help="of the weights, for the model card; default: other")
    add(
        "--register",
        metavar="MODEL",
        help="and make it a version of this model in MLflow: its newest, perhaps its best",
    )
    add("--push-to-hub", metavar="USER/MODEL", help="and upload the folder to this repository of the Hugging Face Hub")
    add("--debug", action="store_true", help="tracebacks instead of one-line errors")


def command(options: argparse.Namespace) -> int:
    """The command with its options parsed; prints where it wrote, returns the exit code. Raises CheckpointError and
    ExportError.
    """
    from pipeline.checkpoints.files import refuse_missing

    refuse_missing(options.checkpoint)
    from pipeline.export.write import Asked, export

    with leaving_by_exception():
        return export(Asked(**{name: getattr(options, name) for name in Asked.__dataclass_fields__}))
