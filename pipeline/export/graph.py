"""The net as a graph: torch.export's program and ONNX, each compared with the net itself before anybody sees it."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.hornet import HorNet

TOLERANCE = {"fp32": 1e-4, "fp16": 1e-3}
OPSET = 20  # what torch's exporter writes without converting
_LARGEST = 64  # strides of 32 px: 2,048 px
_BATCHES = (1, 3)
_ANOTHER = (64, 96)  # height and width that nothing was traced with


class ExportError(ValueError):
    """What cannot be exported, or did not come out as it went in. The message says what to change."""


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


def write_program(model: HorNet, precision: str, side: int, dynamic: bool, file: Path) -> float:
    """`file` (.pt2) as torch.export saves it; returns how far its logits are from the net's. Raises ExportError."""
    whole = Exported(model, precision)
    with _quietly(), torch.no_grad():
        program = torch.export.export(whole, (_images(2, side, side),), dynamic_shapes=_shapes(dynamic))
        torch.export.save(program, file)
        loaded = torch.export.load(file).module()
        return _compared(model, loaded, precision, side, dynamic, file)


def write_onnx(
    model: HorNet, precision: str, side: int, dynamic: bool, file: Path, metadata: Mapping[str, str]
) -> float:
    """`file` (.onnx), weights inside, any batch; returns as `write_program`. Raises ExportError."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise ExportError(
            f"--to onnx needs the package {error.name}: pip install 'hornet-pretraining[export]'"
        ) from None
    whole = Exported(model, precision)
    with _quietly(), torch.no_grad():
        program = torch.onnx.export(
            whole,
            (_images(2, side, side),),
            dynamo=True,
            dynamic_shapes=_shapes(dynamic),
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

    return _compared(model, run, precision, side, dynamic, file)


def _shapes(dynamic: bool) -> tuple[dict[int, Any]]:
    free: dict[int, Any] = {0: torch.export.Dim("batch")}
    if dynamic:
        free |= {axis: 32 * torch.export.Dim(name, min=1, max=_LARGEST) for axis, name in ((2, "rows"), (3, "columns"))}
    return (free,)


def _images(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, height, width, generator=generator)


def _compared(
    model: HorNet, run: Callable[[Tensor], Tensor], precision: str, side: int, dynamic: bool, file: Path
) -> float:
    """The largest difference of a logit from the float32 net's; as a share of the largest logit where that is > 1."""
    worst = 0.0
    sizes = [(batch, side, side) for batch in _BATCHES] + ([(2, *_ANOTHER)] if dynamic else [])
    for size in sizes:
        images = _images(*size)
        with torch.no_grad():
            expected, found = model(images), run(images)
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not difference <= TOLERANCE[precision]:  # NaN too
            what = "give --precision fp32" if precision == "fp16" else "nothing was written; is torch's version tried?"
            raise ExportError(
                f"{file.name} gives other logits than the net, by {difference:.1e} of the largest ({size[0]} images of "
                f"{size[1]} x {size[2]}), {TOLERANCE[precision]:.0e} is allowed: {what}"
            )
        worst = max(worst, difference)
    return worst


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
