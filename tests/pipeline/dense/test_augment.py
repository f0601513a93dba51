"""An image and its mask stay together, whatever is drawn; what is drawn hangs on the key alone."""

from __future__ import annotations

import pytest
import torch

from data_prep.dense_set import IGNORED
from pipeline.config.dense import DenseAugment
from pipeline.data.keyed import uniform_one, view_keys
from pipeline.dense.augment import fitted_size, training_crop

PAD = torch.tensor([124, 116, 104], dtype=torch.uint8)


def settings(**more: float) -> DenseAugment:
    wanted = {"short_side_px": 64, "long_side_max_px": 256, "scale_min": 0.5, "scale_max": 2.0, "class_share_max": 1.0}
    return DenseAugment.model_validate({**wanted, "horizontal_flip": 0.5, "photometric": 0.0, **more})


def scene(height: int = 90, width: int = 130) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask of large squares, some of them ignored, and an image whose red channel is the mask."""
    rows, columns = torch.arange(height)[:, None] // 30, torch.arange(width)[None] // 26
    mask = ((rows * 5 + columns) % 4 * 60).to(torch.uint8)
    return torch.stack([mask, 255 - mask, torch.full_like(mask, 7)]), mask


def test_image_and_mask_stay_together() -> None:
    image, mask = scene()
    outside = mirrored = 0
    for key in view_keys(0, torch.arange(40).numpy()).tolist():
        view, labels = training_crop(image, mask, settings(), 96, key)
        assert (view.shape, labels.shape, view.dtype, labels.dtype) == ((3, 96, 96), (96, 96), torch.uint8, torch.uint8)
        inside = labels != IGNORED
        outside += int((~inside).sum())
        assert (view[:, ~inside] == PAD[:, None]).all()
        # Between two squares the image is a mixture of both; elsewhere it is the mask, to the pixel.
        near = (view[0].int() - labels.int()).abs()[inside] <= 2
        assert near.float().mean() > 0.8
        assert (view[2][inside] == 7).all()
        mirrored += uniform_one(key, 48) < 0.5
    assert outside > 0  # half the scales are smaller than the crop
    assert 10 < mirrored < 30


def test_mirroring_is_of_both() -> None:
    image, mask = scene()
    plain, labels = training_crop(image, mask, settings(horizontal_flip=0.0, scale_min=2.0), 64, 5)
    flipped, flipped_labels = training_crop(image, mask, settings(horizontal_flip=1.0, scale_min=2.0), 64, 5)
    assert torch.equal(plain.flip(2), flipped)
    assert torch.equal(labels.flip(1), flipped_labels)
    assert not torch.equal(labels, flipped_labels)


def test_the_key_alone_decides() -> None:
    image, mask = scene()
    drawn = [training_crop(image, mask, settings(photometric=0.5), 64, key) for key in (1, 2, 1)]
    torch.manual_seed(3)
    assert torch.equal(drawn[0][0], drawn[2][0])
    assert torch.equal(drawn[0][1], drawn[2][1])
    assert not torch.equal(drawn[0][1], drawn[1][1])


def test_colours_change_the_image_alone() -> None:
    torch.manual_seed(0)
    image = torch.randint(40, 200, (3, 64, 64), dtype=torch.uint8)
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    fixed = {"scale_min": 1.0, "scale_max": 1.0, "horizontal_flip": 0.0}
    distorted = [training_crop(image, mask, settings(photometric=1.0, **fixed), 64, key)[0] for key in range(20)]
    left = [training_crop(image, mask, settings(photometric=0.0, **fixed), 64, key)[0] for key in range(20)]
    assert all(torch.equal(view, image) for view in left)
    assert not any(torch.equal(view, image) for view in distorted)
    means = torch.tensor([float(view.float().mean()) for view in distorted])
    assert means.std() > 2  # brightness is drawn anew for each


def test_crops_of_one_class_are_drawn_anew() -> None:
    """A scene that is one class but for a corner: crops that hold the corner are far more frequent."""
    mask = torch.zeros(256, 256, dtype=torch.uint8)
    mask[:100, :100] = 1
    image = mask[None].repeat(3, 1, 1)
    fixed = {"short_side_px": 256, "scale_min": 1.0, "scale_max": 1.0}
    keys = view_keys(1, torch.arange(60).numpy()).tolist()

    def mixed(share: float) -> int:
        crops = [training_crop(image, mask, settings(class_share_max=share, **fixed), 96, key)[1] for key in keys]
        return sum(int(0.25 < (crop == 1).float().mean() < 0.75) for crop in crops)

    assert mixed(0.75) > 2 * mixed(1.0) > 0


@pytest.mark.parametrize(
    ("size", "whole", "half"),
    [
        ((480, 640), (512, 683), (256, 341)),
        ((640, 480), (683, 512), (341, 256)),
        ((100, 1000), (205, 2048), (102, 1024)),
    ],
)
def test_sizes(size: tuple[int, int], whole: tuple[int, int], half: tuple[int, int]) -> None:
    """Shorter side to 512, the longer one to no more than 2048: as mmsegmentation's Resize((2048, 512)) has it."""
    assert fitted_size(*size, 512, 2048, 1.0) == whole
    assert fitted_size(*size, 512, 2048, 0.5) == half
