"""CPU seconds per image of the data loader, against other loaders on the same images and against what nothing can beat.

    python tests/bench/bench_data.py [--images 960] [--sides 224 384] [--rounds 5] [--only NAME ...] [--folder DIR]

Images are crops of two photographs, about 500 x 500 pixels and 70 kB, JPEG quality 90, as an ImageFolder and, through
data_prep, as shards and .betons of the same bytes (and one of raw pixels). Each peer has a process of its own, with one
data worker or thread; it is warmed up (imports, FFCV's compiler), then all take turns, and the median of the rounds
counts. CPU time is that of the process and all its children, when all that was read ahead has been made.

- crop: decode, random-resized crop of 8 to 100 % of the area, flip: uint8 batches of 32
- recipe: and RandAugment (rand-m9-mstd0.5-inc1), normalisation and erasing 0.25 by timm: float batches of 32; with
  augment.where=device the host's part of it is the crop alone

NVIDIA DALI is a peer where it can be imported (package nvidia-dali-cuda130; it needs no GPU here).
"""

import argparse
import io
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

BATCH, WARM_UP, ROUND_BATCHES, ROOT = 32, 8, 10, Path(__file__).parents[2]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RAND_AUGMENT, ERASING = "rand-m9-mstd0.5-inc1", 0.25
Batches = Iterator[Any]


class Target(NamedTuple):
    """`ours` has to take at most 1/ratio of `peer`'s CPU time, at these sides."""

    ours: str
    peer: str
    ratio: float
    sides: tuple[int, ...] = (224, 384)


TARGETS = (
    Target("ours", "webdataset, PIL", 2.0, (224,)),
    Target("ours", "webdataset, PIL", 2.5, (384,)),
    Target("ours", "FFCV, jpg", 1.2),
    Target("ours", "DALI on the CPU", 1.2),
    Target("ours, ffcv jpg", "FFCV, jpg", 0.97),
    Target("ours, ffcv raw", "FFCV, raw", 0.97),
    Target("ours", "recipe: ImageFolder, timm", 3.0),
)


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


def webdataset_turbo(folder: Path, side: int) -> Batches:
    import simplejpeg
    import torch
    from torchvision.transforms import RandomResizedCrop

    def decode(data: bytes) -> np.ndarray:
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)[None]
        top, left, height, width = RandomResizedCrop.get_params(pixels, [0.08, 1.0], [3 / 4, 4 / 3])
        region = pixels[..., top : top + height, left : left + width]
        image = torch.nn.functional.interpolate(region, (side, side), mode="bicubic", antialias=True)[0]
        return (image.flip(2) if torch.rand(()) < 0.5 else image).numpy()

    return webdataset_of(folder, decode)


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


PEERS: dict[str, Callable[[Path, int], Batches]] = {
    "ImageFolder, PIL": pil_crop,
    "webdataset, PIL": webdataset_pil,
    "webdataset, simplejpeg, torch": webdataset_turbo,
    "FFCV, jpg": ffcv_alone("jpg"),
    "FFCV, raw": ffcv_alone("raw"),
    "DALI on the CPU": dali,
    "ours, no worker": ours("data.workers_per_rank=0"),
    "ours": ours(),
    "ours, ffcv jpg": ours("data.format=ffcv"),
    "ours, ffcv raw": ours("data.format=ffcv", mode="raw"),
    "floor: simplejpeg, whole image": floor(decode_alone),
    "floor: crop_resize": floor(decode_crop),
    "recipe: ImageFolder, timm": timm_recipe,
    "recipe: ours, augment.where=host": ours("augment.where=host"),
}


def cpu_seconds() -> float:
    """Of this process and its children, living or not."""
    import psutil

    process = psutil.Process()
    times = [process.cpu_times(), *(child.cpu_times() for child in process.children(recursive=True))]
    own = time.process_time()  # finer than /proc's ticks of 10 ms
    reaped = times[0].children_user + times[0].children_system
    return own + reaped + sum(each.user + each.system for each in times[1:])


def settled_cpu_seconds() -> float:
    """When everything that is read ahead has been made: a round then makes as many images as it takes."""
    last = cpu_seconds()
    while True:
        time.sleep(0.5)
        now = cpu_seconds()
        if now - last < 0.015:
            return now
        last = now


def images_of(batch: Any) -> Any:
    return batch[0] if isinstance(batch, list | tuple) else batch


def serve(name: str, folder: Path, side: int) -> None:
    """A peer's process: a line on stdin is a round, the answer its milliseconds of CPU time per image."""
    import torch

    torch.set_num_threads(1)
    if "FFCV" in name or "ffcv" in name:
        import cv2

        cv2.setNumThreads(1)
        os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
    if "DALI" in name:
        import nvidia.dali  # noqa: F401
    batches = (images_of(batch) for batch in PEERS[name](folder, side))
    epoch = len(list((folder / "tree").rglob("*.JPEG"))) // BATCH
    # FFCV runs dry at the end of an epoch: a round is a whole one.
    count = epoch if "FFCV" in name or "ffcv" in name else ROUND_BATCHES
    for first in itertools.islice(batches, epoch if count == epoch else WARM_UP):
        assert tuple(first.shape) in ((BATCH, side, side, 3), (BATCH, 3, side, side)), first.shape
        assert ("float32" if name.startswith("recipe") else "uint8") in str(first.dtype)
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = settled_cpu_seconds()
        taken = sum(len(batch) for batch in itertools.islice(batches, count))
        print((settled_cpu_seconds() - begun) * 1000 / taken, flush=True)
    os._exit(0)


def measure(names: list[str], folder: Path, side: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds by peer and round; a peer that cannot start is left out, with a word."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    peers: dict[str, subprocess.Popen[str]] = {}
    found: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        command = [sys.executable, __file__, "--serve", name, "--folder", str(folder), "--sides", str(side)]
        pipe = subprocess.PIPE
        peer = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment)
        assert peer.stdout is not None
        assert peer.stderr is not None
        if peer.stdout.readline() != "ready\n":
            print(f"left out: {name}: {(peer.stderr.read().strip().splitlines() or ['no reason given'])[-1]}")
            del found[name]
        else:
            peers[name] = peer
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name in peers:
                stdin, stdout = peers[name].stdin, peers[name].stdout
                assert stdin is not None
                assert stdout is not None
                stdin.write("round\n")
                stdin.flush()
                found[name].append(float(stdout.readline()))
    for peer in peers.values():
        peer.communicate()
    return found


def report(found: dict[str, list[float]], side: int) -> None:
    from rich.console import Console
    from rich.table import Table

    median = {name: statistics.median(values) for name, values in found.items()}
    table = Table("what", "CPU-ms an image", "spread", "images/CPU-s", "ours / this", title=f"{side} px")
    reference = median.get("ours", float("nan"))
    for name, value in median.items():
        spread = (max(found[name]) - min(found[name])) / value
        table.add_row(name, f"{value:.2f}", f"{spread:.0%}", f"{1000 / value:.0f}", f"{value / reference:.2f}")
    goals = Table("target", "wanted", "found", "", title=f"{side} px: images per CPU-second, ratios")
    for target in TARGETS:
        if side in target.sides and target.ours in median and target.peer in median:
            ratio = median[target.peer] / median[target.ours]
            verdict = "met" if ratio >= target.ratio else "MISSED"
            goals.add_row(f"{target.ours} to {target.peer}", f"{target.ratio:g}", f"{ratio:.2f}", verdict)
    for name in ("floor: crop_resize", "floor: simplejpeg, whole image"):
        if name in median and "ours" in median:
            goals.add_row(f"ours to {name}", "", f"{median[name] / median['ours']:.2f}", "")
    Console(width=100).print(table, goals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=960)
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help="of the peers")
    parser.add_argument("--folder", type=Path, help="keep the images there, or take those that are")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, options.sides[0])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "raw" / "dataset.json").exists():
            make_data(folder, options.images)
        sizes = [path.stat().st_size for path in (folder / "tree").rglob("*.JPEG")]
        print(f"{len(sizes)} images of {statistics.mean(sizes) / 1000:.0f} kB; medians of {options.rounds} rounds")
        for side in options.sides:
            report(measure(options.only, folder, side, options.rounds), side)


if __name__ == "__main__":
    main()
