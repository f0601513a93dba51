"""What was written, loaded again, against the net: on images that are drawn, and on those of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

TOLERANCE = {"fp32": 1e-4, "fp16": 1e-3}
_BATCHES = (1, 3)
_ANOTHER = (64, 96)  # height and width that nothing was traced with


class ExportError(ValueError):
    """What cannot be exported, or did not come out as it went in. The message says what to change."""


class Checked(NamedTuple):
    """difference: the largest of a logit, as a share of the largest logit of its batch where that is above 1; of
    `images` of the data set, how many have the `same_top1`.
    """

    difference: float
    images: int
    same_top1: int


@dataclass(frozen=True)
class Check:
    """Of files in `precision`, for images of `side` pixels or of any size. images: batches (B, 3, side, side) of a data
    set, normalised.
    """

    precision: str
    side: int
    any_size: bool = False
    images: Iterable[Tensor] = field(default_factory=tuple)

    def compare(self, net: nn.Module, run: Callable[[Tensor], Tensor], what: str) -> Checked:
        """`run`, what was written, against the float32 `net`. Raises ExportError where logits are too far apart."""
        worst, images, same = 0.0, 0, 0
        for batch, is_drawn in self._batches():
            with torch.no_grad():
                expected, found = net(batch), run(batch)
            difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
            if not difference <= TOLERANCE[self.precision]:  # NaN too
                advice = "give --precision fp32" if self.precision == "fp16" else "try the torch of constraints.txt"
                raise ExportError(
                    f"{what} gives other logits than the net, by {difference:.1e} of the largest "
                    f"({' x '.join(map(str, batch.shape))}; {TOLERANCE[self.precision]:.0e} is allowed): {advice}"
                )
            worst = max(worst, difference)
            if not is_drawn:
                images += len(batch)
                same += int((found.argmax(1) == expected.argmax(1)).sum())
        return Checked(worst, images, same)

    def _batches(self) -> Iterator[tuple[Tensor, bool]]:
        sizes = [(batch, self.side, self.side) for batch in _BATCHES] + ([(2, *_ANOTHER)] if self.any_size else [])
        for size in sizes:
            yield drawn(*size), True
        for batch in self.images:
            yield batch, False


def drawn(batch: int, height: int, width: int) -> Tensor:
    """Images of noise: always the same."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))
