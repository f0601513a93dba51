"""Part of bench_data.py: the images, and the loaders that have been measured since its beginning."""

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BATCH, ROOT = 32, Path(__file__).parents[2]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RAND_AUGMENT, ERASING = "rand-m9-mstd0.5-inc1", 0.25
Batches = Iterator[Any]


def make_data(folder: Path, count: int) -> None:
    """An ImageFolder `tree`, and its shards and .betons `jpg` and `raw`."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in range(count):
        photo, (width, height) = photos[number % 2], rng.integers(300, 428, 2).tolist()
        left, top = int(rng.integers(photo.width - width + 1)), int(rng.integers(photo.height - height + 1))
        image = photo.resize(rng.integers(470, 531, 2).tolist(), 3, (left, top, left + width, top + height))
        noisy = np.asarray(image)[:, :: -1 if rng.random() < 0.5 else 1] + rng.normal(0, 2, (image.height, 1, 3))
        wnid = f"n{number % 10:08d}"
        path = folder / "tree" / wnid / f"{wnid}_{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    for mode in ("jpg", "raw"):
        command = [sys.executable, "-m", "data_prep", "shard", "--source", str(folder / "tree"), "--workers", "1"]
        command += ["--short-side", "1024", "--samples-per-shard", "250", "--output", str(folder / mode)]
        command += ["--duplicates", "keep", "--format", "both", "--beton-mode", mode]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def image_folder(folder: Path, side: int, transform: Any) -> Batches:
    from timm.data.loader import fast_collate
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder

    data = ImageFolder(str(folder / "tree"), transform)
    sampler = RandomSampler(data, replacement=True, num_samples=10**6)
    collate = None if transform.transforms[-1].__class__.__name__ == "RandomErasing" else fast_collate
    return iter(DataLoader(data, BATCH, sampler=sampler, num_workers=1, collate_fn=collate))


def pil_transform(side: int) -> Any:
    from timm.data.transforms import RandomResizedCropAndInterpolation, ToNumpy
    from torchvision.transforms import Compose, RandomHorizontalFlip

    crop = RandomResizedCropAndInterpolation(side, (0.08, 1.0), interpolation="bicubic")
    return Compose([crop, RandomHorizontalFlip(), ToNumpy()])


def pil_crop(folder: Path, side: int) -> Batches:
    return image_folder(folder, side, pil_transform(side))


def timm_recipe(folder: Path, side: int) -> Batches:
    from timm.data import create_transform

    options = {"auto_augment": RAND_AUGMENT, "re_prob": ERASING, "re_mode": "pixel", "interpolation": "bicubic"}
    return image_folder(folder, side, create_transform(side, is_training=True, mean=MEAN, std=STD, **options))


def webdataset_of(folder: Path, decode: Callable[[bytes], np.ndarray]) -> Batches:
    import webdataset

    shards = sorted(map(str, (folder / "jpg").glob("train-*.tar")))
    data = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False).repeat().shuffle(100)
    data = data.to_tuple("jpg", "json").map_tuple(decode, len).batched(BATCH)
    return iter(webdataset.WebLoader(data, batch_size=None, num_workers=1))


def webdataset_pil(folder: Path, side: int) -> Batches:
    transform = pil_transform(side)
    return webdataset_of(folder, lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB")))


def turbo_crop(side: int) -> Callable[[bytes], np.ndarray]:
    """Decoding by simplejpeg, cropping and resizing by torch: (3, side, side)."""
    import simplejpeg
    import torch
    from torchvision.transforms import RandomResizedCrop

    def decode(data: bytes) -> np.ndarray:
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)[None]
        top, left, height, width = RandomResizedCrop.get_params(pixels, [0.08, 1.0], [3 / 4, 4 / 3])
        region = pixels[..., top : top + height, left : left + width]
        image = torch.nn.functional.interpolate(region, (side, side), mode="bicubic", antialias=True)[0]
        return (image.flip(2) if torch.rand(()) < 0.5 else image).numpy()

    return decode


def webdataset_turbo(folder: Path, side: int) -> Batches:
    return webdataset_of(folder, turbo_crop(side))


def ffcv_alone(mode: str) -> Callable[[Path, int], Batches]:
    def batches(folder: Path, side: int) -> Batches:
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip

        image = [RandomResizedCropRGBImageDecoder((side, side), scale=(0.08, 1.0)), RandomHorizontalFlip()]
        pipelines = {"image": image, "label": None, "sample": None}
        order = OrderOption.RANDOM
        # num_workers counts threads; the file is mapped, as ours is.
        loader = Loader(str(folder / mode / "train.beton"), BATCH, 1, os_cache=True, order=order, pipelines=pipelines)
        while True:
            yield from (images for (images,) in loader)

    return batches


def dali(folder: Path, side: int) -> Batches:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, seed=0)
    def crop() -> Any:
        files, _ = fn.readers.file(file_root=str(folder / "tree"), random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(files, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        images = fn.resize(images, size=[side, side], interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip())

    pipeline = crop()
    pipeline.build()
    while True:
        yield np.asarray(pipeline.run()[0].as_array())


def ours(*overrides: str, mode: str = "jpg") -> Callable[[Path, int], Batches]:
    def batches(folder: Path, side: int) -> Batches:
        from data_prep.manifest import Manifest
        from pipeline.config.load import load
        from pipeline.data.loader import training_batches
        from pipeline.data.opened import training_order
        from pipeline.ranks.collectives import Ranks

        changes = [f"data.path={folder / mode}", f"data.resolution={side}", "data.resolution_by_epoch=null"]
        changes += ["data.shuffle_lanes=1", "data.shuffle_window_shards=2", f"train.global_batch={BATCH}"]
        changes += [f"train.micro_batch={BATCH}", "augment.crop_area_min=0.08", "augment.interpolation=bicubic"]
        changes += [f"augment.rand_augment={RAND_AUGMENT}", f"augment.random_erasing={ERASING}"]
        changes += ["augment.where=device", "data.workers_per_rank=1", *overrides]
        config = load(ROOT / "configs/pretrain_hornet_l_in22k_224.yaml", changes)
        manifest = Manifest.load(config.data.path)
        order = training_order(config, manifest)
        found = training_batches(config, manifest, order, Ranks(), 0, order.steps_per_epoch * config.train.epochs)
        return (batch.images for batch in found)

    return batches


def floor(make: Callable[[bytes, int, np.ndarray, int], object]) -> Callable[[Path, int], Batches]:
    """A bare loop over files in memory: no loader at all."""

    def batches(folder: Path, side: int) -> Batches:
        files = [path.read_bytes() for path in sorted((folder / "tree").rglob("*.JPEG"))]
        random_order = np.random.default_rng(0).integers(len(files), size=10**6).tolist()
        numbers = iter(random_order)
        while True:
            out = np.empty((BATCH, side, side, 3), np.uint8)
            for slot in range(BATCH):
                number = next(numbers)
                make(files[number], side, out[slot], (number * 7919 + slot) * 0x9E3779B9)
            yield out

    return batches


def decode_alone(data: bytes, side: int, out: np.ndarray, key: int) -> None:
    import simplejpeg

    simplejpeg.decode_jpeg(data)


def decode_crop(data: bytes, side: int, out: np.ndarray, key: int) -> None:
    from pipeline.data.decode import crop_resize, image_size
    from pipeline.data.keyed import crop_box, flipped

    crop_resize(data, crop_box(*image_size(data), 0.08, key), side, out, flipped(key, 0.5))
