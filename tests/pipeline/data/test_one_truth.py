"""One function says what a file looks like: `shard`, training, evaluation, `verify` and `duplicates` agree on all kinds
of image files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_prep.__main__ import main
from data_prep.duplicates.hashing import hash_image
from data_prep.images.pixels import check_image
from data_prep.images.prepare import ImagePolicy, prepare_image
from data_prep.images.rejection import REASONS, WORD, ImageRejected
from data_prep.manifest import Manifest
from pipeline.config.load import load
from pipeline.data import decode
from pipeline.data.augment import evaluation_transform
from pipeline.data.decode import DecodeError, crop_resize, decode_region, decode_rgb, image_size
from pipeline.data.evaluation import EvaluationImages
from pipeline.data.shards import DataError, ShardReader
from tests.support.image_kinds import BAD, GOOD, ask_safely

needs_compiled = pytest.mark.skipif(not decode.COMPILED, reason="pipeline.data._jpeg is not built")


@pytest.fixture(autouse=True)
def _asked_safely(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_safely(monkeypatch)


@pytest.fixture(params=[pytest.param(True, marks=needs_compiled, id="compiled"), pytest.param(False, id="fallback")])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(decode, "COMPILED", request.param)
    return request.param


def seen_by_shard(data: bytes, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The pixels that `shard` gives its encoder. Raises ImageRejected."""
    given: list[np.ndarray] = []
    encode = simplejpeg.encode_jpeg

    def recorded(pixels: np.ndarray, *options: object) -> bytes:
        given.append(pixels.copy())
        return encode(pixels, *options)

    with monkeypatch.context() as patch:
        patch.setattr(simplejpeg, "encode_jpeg", recorded)
        prepare_image(data, ImagePolicy(short_side_px=10_000, reencode="always", min_side_px=0))
    (pixels,) = given
    return pixels


@pytest.mark.parametrize("kind", GOOD)
def test_shard_and_training_see_the_same(kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = GOOD[kind]
    wanted = seen_by_shard(data, monkeypatch)
    height, width = wanted.shape[:2]
    assert image_size(data) == (height, width)
    np.testing.assert_array_equal(decode_rgb(data), wanted)
    box = (height // 3, width // 4, -(-height // 3), -(-width // 2))
    part = wanted[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
    np.testing.assert_array_equal(decode_region(data, *box), part)
    resized = np.asarray(Image.fromarray(part).resize((20, 20), Image.Resampling.BICUBIC))
    assert np.abs(crop_resize(data, box, 20, scaled=False).astype(int) - resized).max() <= (0 if compiled else 3)
    assert check_image(data) == (width, height)


@pytest.mark.parametrize("kind", GOOD)
def test_duplicates_hash_what_shard_sees(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a JPEG at a scale: a few bits may differ."""
    wanted = io.BytesIO()
    Image.fromarray(seen_by_shard(GOOD[kind], monkeypatch)).save(wanted, "PNG")
    found, expected = hash_image(GOOD[kind]), hash_image(wanted.getvalue())
    assert (found.plain ^ expected.plain).bit_count() <= 6
    assert found.contrast == pytest.approx(expected.contrast, abs=2)


@pytest.mark.parametrize("kind", BAD)
def test_shard_training_and_verify_reject_the_same(kind: str, compiled: bool) -> None:
    """In words."""
    with pytest.raises(ImageRejected) as by_shard:
        prepare_image(BAD[kind], ImagePolicy(min_side_px=0))
    with pytest.raises(ImageRejected) as by_verify:
        check_image(BAD[kind])
    with pytest.raises(DecodeError) as by_training:
        decode_rgb(BAD[kind])
    assert by_shard.value.reason in REASONS
    assert WORD.search(by_shard.value.detail)
    assert str(by_verify.value) == str(by_shard.value)
    assert str(by_training.value) == " ".join(str(by_shard.value).split())


def test_bytes_changed_at_random(compiled: bool) -> None:
    """What `shard` takes, training takes, with the same pixels; what it rejects, training refuses."""
    rng = np.random.default_rng(3)
    sources = [GOOD[kind] for kind in ("plain", "restart markers", "progressive", "gray", "cmyk", "4:4:1", "lossless")]
    ends = {"kept": 0, "rejected": 0}
    for number in range(700 if compiled else 200):
        data = bytearray(sources[number % len(sources)])
        for _ in range(rng.integers(1, 3)):
            data[rng.integers(2, len(data))] ^= 1 << int(rng.integers(8))
        try:
            wanted = prepare_image(bytes(data), ImagePolicy(min_side_px=0, short_side_px=10_000))
        except ImageRejected:
            ends["rejected"] += 1
            with pytest.raises(DecodeError):
                decode_rgb(bytes(data))
            continue
        ends["kept"] += 1
        assert decode_rgb(bytes(data)).shape == (wanted.source_height, wanted.source_width, 3)
        assert decode_rgb(wanted.jpeg).shape == (wanted.height, wanted.width, 3)
    assert min(ends.values()) > 40, ends


@pytest.fixture(scope="module")
def plain_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good kinds as train, bad ones as val; a plain tar of each, whatever they are all called `.jpg`."""
    folder = tmp_path_factory.mktemp("plain")
    for split, kinds in (("train", GOOD), ("val", {name: data for name, data in BAD.items() if data})):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for number, data in enumerate(kinds.values()):
                info = tarfile.TarInfo(f"n01440764_{number:03}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def test_a_plain_set_of_all_kinds(
    plain_set: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Indexed; evaluation shows `shard`'s pixels of every good file and refuses every bad one; `verify` names the bad,
    and those alone."""
    assert main(["index", str(plain_set)]) == 0
    config = load(
        "configs/demo_pretrain.yaml", [f"data.path={plain_set}", "data.workers_per_rank=0", "data.resolution=32"]
    )
    manifest = Manifest.load(plain_set)
    reader = ShardReader(config.data, manifest, "train")
    (batch,) = EvaluationImages(config, reader, [np.arange(len(GOOD))])
    assert not isinstance(batch, DataError), batch
    transform = evaluation_transform(config.evaluate, config.data.resolution)
    for name, data, image in zip(GOOD, GOOD.values(), batch.images, strict=True):
        wanted = transform(Image.fromarray(seen_by_shard(data, monkeypatch)))
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(wanted), name)
    bad = [data for data in BAD.values() if data]
    reader = ShardReader(config.data, manifest, "val")
    for sample in range(len(bad)):
        (error,) = EvaluationImages(config, reader, [np.array([sample])])
        assert isinstance(error, DataError), sample
    capsys.readouterr()
    assert main(["verify", str(plain_set), "--workers", "1"]) == 1
    *problems, _ = capsys.readouterr().out.splitlines()
    named = [line.partition(" cannot be decoded: ")[0] for line in problems]
    assert named == [f"val.tar: n01440764_{number:03}" for number in range(len(bad))]
