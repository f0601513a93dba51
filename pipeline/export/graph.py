"""The net as a graph: torch.export's program and ONNX, each compared with the net itself before anybody sees it."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.export.check import Check, Checked, ExportError, drawn
from pipeline.models.hornet import HorNet

OPSET = 20  # what torch's exporter writes without converting
_LARGEST = 64  # strides of 32 px: 2,048 px


class Exported(nn.Module):
    """What is written: (B, 3, H, W) float32, normalised -> (B, classes) float32 logits; fp16 is inside alone."""

    def __init__(self, model: HorNet, precision: str) -> None:
        super().__init__()
        self.model, self.half_body = in_precision(model, precision), precision == "fp16"

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.model(image.half() if self.half_body else image)
        return logits


def in_precision(model: HorNet, precision: str) -> HorNet:
    """A copy in eval mode; with fp16, all but the last norm and the head are: logits stay float32."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if precision == "fp16":
        model.half()
        model.norm.float()
        model.head.float()
    return model


def check_size(model: HorNet, dynamic: bool, side: int) -> None:
    """Raise ExportError where height and width are asked to be free and cannot be."""
    if dynamic and any(model.filters):
        raise ExportError(
            f"--dynamic-size: the global filters of this model are of one image size: leave it out, for a file of "
            f"{side} px, and give --resolution for another one"
        )


def write_program(model: HorNet, check: Check, file: Path) -> Checked:
    """`file` (.pt2) as torch.export saves it. Raises ExportError."""
    whole = Exported(model, check.precision)
    with _quietly(), torch.no_grad():
        program = torch.export.export(
            whole, (drawn(2, check.side, check.side),), dynamic_shapes=_shapes(check.any_size)
        )
        torch.export.save(program, file)
        loaded = torch.export.load(file).module()
        return check.compare(model, loaded, file.name)


def write_onnx(model: HorNet, check: Check, file: Path, metadata: Mapping[str, str]) -> Checked:
    """`file` (.onnx), weights inside, any batch. Raises ExportError."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise ExportError(
            f"--to onnx needs the package {error.name}: pip install 'hornet-pretraining[export]'"
        ) from None
    whole = Exported(model, check.precision)
    with _quietly(), torch.no_grad():
        program = torch.onnx.export(
            whole,
            (drawn(2, check.side, check.side),),
            dynamo=True,
            dynamic_shapes=_shapes(check.any_size),
            input_names=["image"],
            output_names=["logits"],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update(metadata)
        program.save(file, external_data=False)
    del program
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"image": images.numpy()})[0])

    return check.compare(model, run, file.name)


def _shapes(dynamic: bool) -> tuple[dict[int, Any]]:
    free: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic:
        free |= {axis: 32 * torch.export.Dim(name, min=1, max=_LARGEST) for axis, name in ((2, "rows"), (3, "columns"))}
    return (free,)


@contextmanager
def _quietly() -> Iterator[None]:
    """torch's exporters tell much that is for those who write them."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch._dynamo")
    before = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
