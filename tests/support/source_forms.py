"""Every form in which a source of images comes, small, with the truth about its images and strays."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

from data_prep.sources.chunking import Source
from data_prep.sources.items import Item, Record
from data_prep.sources.reading import Chunk
from data_prep.storage import Folder

WNIDS = ("n00000003", "n00000001", "n00000002")
Truth = dict[tuple[str, str, str], bytes]


def content(*key: object) -> bytes:
    rng = random.Random(str(key))
    return rng.randbytes(rng.randint(0, 1500))


def images(split: str, wnids: tuple[str, ...] = WNIDS, count: int = 7) -> Truth:
    names = [f"{{}}_{i}.JPEG" for i in range(count)] + ["sub/ümlaut {}.JPEG"]
    return {(split, w, n.format(w)): content(split, w, n) for w in wnids for n in names}


def tar_of(members: dict[str, bytes], fmt: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=fmt) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def synset_tars(truth: Truth) -> dict[str, bytes]:
    wnids = dict.fromkeys(wnid for _, wnid, _ in truth)
    return {f"{w}.tar": tar_of({n: d for (_, wnid, n), d in truth.items() if wnid == w}) for w in wnids}


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        write(root / name, data)
    return root


# Each form: writes itself below a folder, returns (path, kind, truth, reasons of strays by name).
Form = tuple[Path, str, Truth, dict[str, str]]


def tar_of_tars(root: Path, pack: Callable[[bytes], bytes] = bytes) -> Form:
    truth = images("train")
    members = {"readme.txt": b"x", "d/._n00000009.tar": b"x", **synset_tars(truth), "n00000007.tar": tar_of({})}
    return (
        write(root / "whole", pack(tar_of(members))),
        "tar-of-tars",
        truth,
        {
            "readme.txt": "no_class",
            "d/._n00000009.tar": "not_an_image",
        },
    )


def folder_of_tars(root: Path) -> Form:
    truth = images("train")
    tars = synset_tars(truth)
    tars["n00000002.tar.gz"] = gzip.compress(tars.pop("n00000002.tar"))
    return write_tree(root / "tars", {**tars, "list.txt": b"x"}), "folder-of-tars", truth, {"list.txt": "no_class"}


def class_folders(root: Path) -> Form:
    truth = images("train")
    files = {f"{w}/{n}": d for (_, w, n), d in truth.items()}
    extra = {"n00000001/.DS_Store": b"x", "words.txt": b"x"}
    reasons = {"n00000001/.DS_Store": "not_an_image", "words.txt": "no_class"}
    return write_tree(root / "folders", {**files, **extra}), "class-folders", truth, reasons


def trees(train: str, val: str, small: str | None) -> tuple[dict[str, bytes], Truth, dict[str, str]]:
    truth = {**images("train"), **images("val", WNIDS[:2], 2)}
    files = {f"{train if s == 'train' else val}/{w}/{n}": d for (s, w, n), d in truth.items()}
    if small is None:
        return files, truth, {}
    return {**files, f"{small}/n00000008/a.JPEG": b"12"}, truth, {"a.JPEG": "small_class"}


def split_folders(root: Path) -> Form:
    files, truth, _ = trees("train", "val", None)
    strays = {"readme.txt": "no_class", "train/list.txt": "no_class", "test/a.JPEG": "test_split"}
    extra = {"readme.txt": b"x", "train/list.txt": b"x", "test/a.JPEG": b"x"}
    return write_tree(root / "splits", {**files, **extra}), "split-folders", truth, strays


def folders_of_21k_p(root: Path) -> Form:
    files, truth, strays = trees("imagenet21k_train", "imagenet21k_val", "imagenet21k_small_classes")
    return write_tree(root / "imagenet21k_resized", files), "split-folders", truth, strays


def tree_tar(root: Path) -> Form:
    truth = images("train")
    files = {f"./set/{w}/{n}": d for (_, w, n), d in truth.items()}
    data = tar_of({"./set/": b"", "./set/n00000007/": b"", **files, "set/._x": b"x"}, tarfile.PAX_FORMAT)
    return write(root / "tree.tar", data), "tar-of-class-folders", truth, {"set/._x": "not_an_image"}


def tar_of_21k_p(root: Path) -> Form:
    files, truth, strays = trees("imagenet21k_train", "imagenet21k_val", "imagenet21k_small_classes")
    data = tar_of({f"imagenet21k_resized/{name}": data for name, data in files.items()})
    return write(root / "imagenet21k_resized.tar.gz", gzip.compress(data)), "tar-of-class-folders", truth, strays


FORMS: dict[str, Callable[[Path], Form]] = {
    "tar": tar_of_tars,
    "tar.gz": lambda root: tar_of_tars(root, gzip.compress),
    "tar.gz of two members": lambda root: tar_of_tars(root, lambda b: gzip.compress(b[:700]) + gzip.compress(b[700:])),
    "tar.bz2": lambda root: tar_of_tars(root, bz2.compress),
    "tar.xz": lambda root: tar_of_tars(root, lzma.compress),
    **{f.__name__: f for f in (folder_of_tars, class_folders, split_folders, folders_of_21k_p, tree_tar, tar_of_21k_p)},
}


def all_chunks(source: Source, max_bytes: int, spool: Folder, max_images: int = 1000, done=()) -> list[Chunk]:
    return list(source.chunks(max_bytes, max_images, spool, done))


def items_of(chunks: list[Chunk]) -> list[Item]:
    return [item for chunk in chunks for item in pickle.loads(pickle.dumps(chunk)).items()]


def truth_of(items: list[Item]) -> Truth:
    records = [item for item in items if isinstance(item, Record)]
    truth = {(r.split, r.wnid, r.name): r.data for r in records}
    assert len(truth) == len(records)
    return truth
