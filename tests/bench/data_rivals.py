"""Part of bench_data.py: the loaders that people choose today. Each makes its own form of the images once, in `folder`.

All crop and flip as ours do, to uint8 batches of 32, by one worker or thread; pixels by torch's antialiased bicubic (of
timm's `wds/` and Hugging Face datasets, which decode by PIL, by PIL's).
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from data_peers import BATCH, Batches, pil_transform, turbo_crop


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "tree").rglob("*.JPEG"))


class V2Files:
    """A map-style data set over files, as torchvision's documentation has it."""

    def __init__(self, folder: Path, side: int):
        import torch
        from torchvision.transforms import InterpolationMode, v2

        torch.set_num_threads(1)
        self.files = files_of(folder)
        crop = v2.RandomResizedCrop(side, (0.08, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from torchvision.io import ImageReadMode, decode_jpeg, read_file

        return self.transform(decode_jpeg(read_file(str(self.files[index])), ImageReadMode.RGB))


def torch_loader(data: Any) -> Batches:
    from torch.utils.data import DataLoader, RandomSampler

    sampler = RandomSampler(data, replacement=True, num_samples=10**6)
    return iter(DataLoader(data, BATCH, sampler=sampler, num_workers=1))


def torchvision_v2(folder: Path, side: int) -> Batches:
    return torch_loader(V2Files(folder, side))


def endless(epoch: Any) -> Batches:
    """Epoch after epoch; loaders keep their workers between, or starting them would be what is measured."""
    return itertools.chain.from_iterable(iter(epoch) for _ in itertools.count())


def read(path: str) -> dict[str, Any]:
    return {"jpg": Path(path).read_bytes()}


class Decoded:
    """A sample of bytes to pixels; made in the worker."""

    def __init__(self, side: int):
        self.side = side
        self.decode: Callable[[bytes], np.ndarray] | None = None

    def __call__(self, sample: dict[str, Any]) -> np.ndarray:
        self.decode = self.decode or turbo_crop(self.side)
        return self.decode(sample["jpg"])


def litdata(folder: Path, side: int) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    where = folder / "litdata"
    if not (where / "index.json").exists():
        optimize(read, [str(path) for path in files_of(folder)], str(where), chunk_bytes="16MB", num_workers=1)
    data = StreamingDataset(str(where), shuffle=True, transform=Decoded(side))
    return endless(StreamingDataLoader(data, batch_size=BATCH, num_workers=1, persistent_workers=True))


def mds(folder: Path, side: int) -> Batches:
    import shutil

    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    class Files(StreamingDataset):
        decoded = Decoded(side)

        def __getitem__(self, at: int) -> Any:
            return self.decoded(super().__getitem__(at))

    where = folder / "mds"
    if not (where / "index.json").exists():
        shutil.rmtree(where, ignore_errors=True)
        with MDSWriter(out=str(where), columns={"jpg": "bytes"}, size_limit="16MB") as writer:
            for path in files_of(folder):
                writer.write({"jpg": path.read_bytes()})
    data = Files(local=str(where), shuffle=True, batch_size=BATCH)
    return endless(DataLoader(data, BATCH, num_workers=1, persistent_workers=True))


def spdl(folder: Path, side: int) -> Batches:
    from spdl.pipeline import PipelineBuilder

    files, rng, decode = files_of(folder), np.random.default_rng(0), turbo_crop(side)

    def endless_files() -> Iterator[Path]:
        while True:
            yield from (files[number] for number in rng.permutation(len(files)))

    def load(path: Path) -> np.ndarray:
        return decode(path.read_bytes())

    builder = PipelineBuilder().add_source(endless_files()).pipe(load, concurrency=1).aggregate(BATCH)
    pipeline = builder.pipe(np.stack).add_sink(2).build(num_threads=1)
    with pipeline.auto_stop():
        yield from pipeline


def hugging_face(folder: Path, side: int) -> Batches:
    from datasets import load_dataset

    cache = str(folder / "hf")
    data = load_dataset("imagefolder", data_dir=str(folder / "tree"), split="train", cache_dir=cache)
    transform = pil_transform(side)
    data.set_transform(lambda rows: {"image": [transform(image.convert("RGB")) for image in rows["image"]]})
    return (batch["image"] for batch in torch_loader(data))


def timm_wds(folder: Path, side: int) -> Batches:
    import webdataset
    from timm.data import create_dataset
    from timm.data.loader import fast_collate
    from torch.utils.data import DataLoader

    where = folder / "wds"
    if not (where / "_info.json").exists():
        where.mkdir(exist_ok=True)
        files = files_of(folder)
        counts = []
        for start in range(0, len(files), 250):
            with webdataset.TarWriter(str(where / f"train-{start // 250:04d}.tar")) as writer:
                for path in files[start : start + 250]:
                    label = str(int(path.parent.name[1:]))
                    writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": label})
            counts.append(len(files[start : start + 250]))
        names = [f"train-{number:04d}.tar" for number in range(len(counts))]
        split = {"name": "train", "filenames": names, "shard_lengths": counts, "num_samples": len(files)}
        (where / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    data = create_dataset("wds/set", root=str(where), split="train", is_training=True, batch_size=BATCH)
    data.transform = pil_transform(side)
    loader = DataLoader(data, BATCH, num_workers=1, collate_fn=fast_collate, persistent_workers=True)
    return (images for images, _ in endless(loader))


RIVALS: dict[str, Callable[[Path, int], Batches]] = {
    "torchvision v2": torchvision_v2,
    "litdata, simplejpeg": litdata,
    "SPDL, simplejpeg": spdl,
    "MDS, simplejpeg": mds,
    "Hugging Face datasets": hugging_face,
    "timm wds/": timm_wds,
}
