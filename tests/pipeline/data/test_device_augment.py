"""The augmentation on the device against timm's transforms: its operations byte for byte, its draws in distribution."""

import math
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from timm.data import auto_augment, create_transform
from timm.data import random_erasing as timm_erasing
from torchvision.transforms import ColorJitter

from pipeline.data import device_augment, device_ops, keyed
from pipeline.data.device_augment import FILL, LEVELS, NO_OP, OPS, DeviceAugment, Layer

PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]  # 640 x 427, real
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
PUBLISHED, DEMO = "rand-m9-mstd0.5-inc1", "rand-m5-n1-p0.3-mstd0.5-inc1"
UNIFORM_PLAIN, BEYOND_10 = "rand-m8-mstd101", "rand-m14-mmax20-mstd3-n3-p1.0-inc1"
STRINGS = [PUBLISHED, DEMO, UNIFORM_PLAIN, BEYOND_10]
LEAST_P = 1e-3  # of any statistical test here; all of them have fixed seeds


def augmentation(device="cpu", **changes):
    settings = {"rand_augment": PUBLISHED, "color_jitter": 0.4, "random_erasing": 0.25, "interpolation": "bicubic"}
    return DeviceAugment(SimpleNamespace(**settings | changes), device)


def crops(count, width, height, seed=0):
    """PIL crops of the photographs, at places of their own."""
    rng = np.random.default_rng(seed)
    corners = [(int(rng.integers(640 - width + 1)), int(rng.integers(427 - height + 1))) for _ in range(count)]
    return [PHOTOS[i % 2].crop((x, y, x + width, y + height)) for i, (x, y) in enumerate(corners)]


def as_batch(images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def keys_of(count, seed=0):
    return keyed.view_keys(seed, np.arange(count))


def as_bytes(augment, images, layers):
    """What `layers` make of a batch, before it is normalised: uint8 (B, 3, H, W)."""
    normalised = augment.apply(images, layers, np.zeros((0, 7), dtype=np.int64))
    values = (normalised.double() * augment.std + augment.mean) * 255
    assert (values - values.round()).abs().max() < 1e-3
    return values.round().to(torch.uint8)


def timm_op(image, name, argument, interpolation):
    """timm's operation, on a PIL image."""
    whole = name in ("Posterize", "Solarize", "SolarizeAdd")
    arguments = () if name in ("AutoContrast", "Equalize", "Invert") else (int(argument) if whole else float(argument),)
    return auto_augment.NAME_TO_OP[name](image, *arguments, fillcolor=FILL, resample=RESAMPLE[interpolation])


def timm_last(augment_settings, size):
    """timm's transforms from the cropped PIL image on: (RandAugment or jitter, to a normalised tensor)."""
    parts = create_transform(
        input_size=size,
        is_training=True,
        auto_augment=augment_settings.get("rand_augment", PUBLISHED),
        color_jitter=0.4,
        interpolation=augment_settings.get("interpolation", "bicubic"),
        re_prob=augment_settings.get("random_erasing", 0.0),
        re_mode="pixel",
        separate=True,
    )
    return parts[1], parts[2]


# ------------------------------------------------------------------------------------------------------ operations


def levels(monkeypatch):
    """(timm's name, argument) at many magnitudes and both signs, from timm's own level functions."""
    found = []
    for sign in (1, -1):
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        for name in sorted(LEVELS):
            for magnitude in (0.0, 0.4, 2.5, 4.99, 7.7, 9.0, 10.0, 16.0):
                function = auto_augment.LEVEL_TO_ARG[name]
                argument = function(magnitude, {})[0] if function else 0.0
                ours = LEVELS[name](np.array([magnitude]) / 10.0, np.array([float(sign)]))
                assert ours == argument, (name, magnitude, sign)
                found.append((name, argument))
    return found


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(160, 160), (97, 61), (20, 45), (15, 17)])
def test_every_operation_gives_the_bytes_of_timms(size, interpolation, monkeypatch):
    cases = levels(monkeypatch)
    images = crops(len(cases), *size)
    layer = Layer(
        np.array([OPS.index(name.removesuffix("Increasing")) for name, _ in cases]),
        np.array([float(argument) for _, argument in cases]),
    )
    ours = as_bytes(augmentation(interpolation=interpolation), as_batch(images), [layer])
    for image, (name, argument), mine in zip(images, cases, ours, strict=True):
        theirs = np.asarray(timm_op(image, name.removesuffix("Increasing"), argument, interpolation))
        np.testing.assert_array_equal(mine.permute(1, 2, 0).numpy(), theirs, err_msg=f"{name} {argument} {size}")


def test_images_of_few_values_give_the_bytes_of_timms():
    rng = np.random.default_rng(0)
    shape = (24, 31, 3)
    images = [Image.fromarray(np.full(shape, value, dtype=np.uint8)) for value in (0, 7, 255)]
    images += [Image.fromarray(rng.choice(values, shape).astype(np.uint8)) for values in ([0, 255], [3, 4], [250, 9])]
    images += [Image.fromarray(rng.integers(low, high, shape, dtype=np.uint8)) for low, high in ((0, 256), (90, 110))]
    for number, name in enumerate(OPS):
        arguments = np.full(len(images), 0.37)
        ours = as_bytes(augmentation(), as_batch(images), [Layer(np.full(len(images), number), arguments)])
        for image, mine in zip(images, ours, strict=True):
            theirs = np.asarray(timm_op(image, name, 0.37, "bicubic"))
            np.testing.assert_array_equal(mine.permute(1, 2, 0).numpy(), theirs, err_msg=name)


@pytest.mark.parametrize("turn", [90.0, 180.0, -90.0, 359.9])
def test_turns_beyond_30_degrees(turn):
    for image in (*crops(1, 64, 64), *crops(1, 40, 30)):
        ours = as_bytes(augmentation(), as_batch([image]), [Layer(np.array([OPS.index("Rotate")]), np.array([turn]))])
        np.testing.assert_array_equal(
            ours[0].permute(1, 2, 0).numpy(), np.asarray(timm_op(image, "Rotate", turn, "bicubic"))
        )


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_translations_by_half_pixels(interpolation):
    """Here pixel centres fall on the border exactly."""
    cases = [(op, pixels / 64) for op in ("TranslateXRel", "TranslateYRel") for pixels in (-10.5, -0.5, 0.5, 7.0, 63.5)]
    images = crops(len(cases), 64, 64)
    layer = Layer(np.array([OPS.index(op) for op, _ in cases]), np.array([share for _, share in cases]))
    ours = as_bytes(augmentation(interpolation=interpolation), as_batch(images), [layer])
    for image, case, mine in zip(images, cases, ours, strict=True):
        np.testing.assert_array_equal(mine.permute(1, 2, 0).numpy(), np.asarray(timm_op(image, *case, interpolation)))


@pytest.mark.parametrize(
    "settings",
    [
        {"rand_augment": PUBLISHED},
        {"rand_augment": DEMO, "interpolation": "bilinear"},
        {"rand_augment": UNIFORM_PLAIN},
        {"rand_augment": BEYOND_10},
        {"rand_augment": None},
    ],
)
def test_the_chain_with_the_same_draws_gives_the_bits_of_timms(settings):
    augment = augmentation(**settings, random_erasing=0.0)
    images, keys = crops(60, 72, 72), keys_of(60)
    layers = augment.draw_layers(keys)
    ours = augment(as_batch(images), keys)
    _, to_tensor = timm_last(settings, 72)
    for view, image in enumerate(images):
        for layer in layers:
            if layer.ops[view] != NO_OP:
                interpolation = settings.get("interpolation", "bicubic")
                image = timm_op(image, OPS[layer.ops[view]], layer.arguments[view], interpolation)
        assert torch.equal(ours[view], to_tensor(image)), view


# ------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("text", [PUBLISHED, None])
def test_a_view_depends_on_its_key_alone(text, monkeypatch):
    augment = augmentation(rand_augment=text, random_erasing=0.5)
    images, keys = as_batch(crops(40, 50, 38)), keys_of(40)
    before = images.clone()
    all_at_once = augment(images, keys)
    assert torch.equal(images, before)
    backwards = augment(images.flip(0), keys[::-1])
    assert torch.equal(backwards.flip(0), all_at_once)
    for view in (0, 17, 39):
        assert torch.equal(augment(images[view : view + 1], keys[view : view + 1])[0], all_at_once[view])
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(images.contiguous(), keys), all_at_once)
    monkeypatch.setattr(device_ops, "CHUNK_PIXELS", 4000)  # two images
    assert torch.equal(augment(images, keys), all_at_once)
    assert not torch.equal(augment(images, keys_of(40, seed=1)), all_at_once)


def test_no_two_draws_share_a_number():
    augment = augmentation(rand_augment="rand-m9-n4-mstd0.5")
    used = [
        np.arange(device_augment.ERASE_DRAWS, device_augment.ERASE_DRAWS + 3 + 4 * device_augment.ERASE_TRIES),
        np.arange(device_augment.JITTER_DRAWS, device_augment.JITTER_DRAWS + 4),
        device_augment.LAYER_DRAWS + np.arange(augment.policy.layers * device_augment.DRAWS_PER_LAYER),
    ]
    numbers = np.concatenate(used)
    assert len(set(numbers)) == len(numbers)
    assert numbers.min() >= keyed.DEVICE_DRAWS


def test_nothing_waits_for_the_device():
    """Tensors of the meta device have no values: whatever asked for one would raise."""
    for text in (PUBLISHED, UNIFORM_PLAIN, None):
        augment = augmentation("meta", rand_augment=text, random_erasing=0.5)
        out = augment(torch.empty(300, 3, 30, 41, dtype=torch.uint8, device="meta"), keys_of(300))
        assert (out.shape, out.dtype) == ((300, 3, 30, 41), torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_cuda_gives_the_bits_of_the_cpu_without_waiting(interpolation):
    images, keys = as_batch(crops(256, 96, 80)), keys_of(256)
    for text in (*STRINGS, None):
        settings = {"rand_augment": text, "interpolation": interpolation, "random_erasing": 0.5}
        there, augment = images.cuda(), augmentation("cuda", **settings)
        augment(there, keys)  # the first call may wait, for memory
        torch.cuda.set_sync_debug_mode("error")
        out = augment(there, keys)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out.cpu(), augmentation(**settings)(images, keys)), text


def test_torch_numpy_and_timm_are_enough():
    code = "import sys; sys.modules.update(dict.fromkeys(('pydantic', 'yaml', 'deepspeed', 'webdataset', 'ffcv')));"
    subprocess.run([sys.executable, "-c", code + "import pipeline.data.device_augment"], check=True)


# ---------------------------------------------------------------------------------------------------- distributions


def timm_draws(text, count):
    """{(operation, layer): arguments} of what timm applies to `count` images, and how often it applies nothing."""
    random.seed(1)
    np.random.seed(1)
    transform = auto_augment.rand_augment_transform(text, {"img_mean": FILL})
    applied = []
    for op in transform.ops:
        name = op.name.removesuffix("Increasing")

        def record(image, *arguments, name=name, **_):
            applied.append((name, float(arguments[0]) if arguments else 0.0))
            return image

        op.aug_fn = record
    image = PHOTOS[0].crop((0, 0, 1, 1))
    for _ in range(count):
        transform(image)
    return applied, count * transform.num_layers - len(applied)


def same_counts(first, second):
    """The p of a chi-square test that two rows of counts are of one distribution."""
    table = np.array([first, second])
    return stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue


@pytest.mark.parametrize("text", STRINGS)
def test_operations_magnitudes_and_signs_are_drawn_as_timm_draws(text):
    count = 8000
    theirs, skipped = timm_draws(text, count)
    layers = augmentation(rand_augment=text).draw_layers(keys_of(count, seed=2))
    ops, arguments = (np.concatenate(each) for each in zip(*layers, strict=True))
    assert len(ops) == len(theirs) + skipped
    counts = [(ops == number).sum() for number in range(len(OPS))]
    expected = [sum(name == op for name, _ in theirs) for op in OPS]
    assert same_counts([*counts, (ops == NO_OP).sum()], [*expected, skipped]) > LEAST_P
    for number, op in enumerate(OPS):
        mine = arguments[ops == number]
        others = np.array([argument for name, argument in theirs if name == op])
        if op in ("AutoContrast", "Equalize", "Invert"):
            continue
        assert stats.ks_2samp(mine, others).pvalue > LEAST_P, op
        values = np.union1d(mine, others)
        if len(values) < 20:  # whole numbers
            assert same_counts(*([(each == value).sum() for value in values] for each in (mine, others))) > LEAST_P, op
        assert same_counts(*([(each < 0).sum(), (each >= 0).sum()] for each in (mine, others))) > LEAST_P, op
    if len(layers) > 1:  # with replacement, and independent
        first, second = layers[0].ops, layers[1].ops
        both = (first != NO_OP) & (second != NO_OP)
        assert stats.binomtest(int((first == second)[both].sum()), int(both.sum()), 1 / 15).pvalue > LEAST_P
        gates = [[((first == NO_OP) & (second == NO_OP)).sum(), ((first == NO_OP) & (second != NO_OP)).sum()]]
        gates.append([((first != NO_OP) & (second == NO_OP)).sum(), both.sum()])
        assert not np.sum(gates[0]) or stats.chi2_contingency(gates).pvalue > LEAST_P


def test_jitter_is_drawn_as_torchvision_draws():
    count = 3000
    torch.manual_seed(3)
    theirs = [ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), None) for _ in range(count)]
    layers = augmentation(rand_augment=None).draw_layers(keys_of(count))
    names = ("Brightness", "Contrast", "Color")
    orders = [tuple(names[step] for step in order if step < 3) for order, *_ in theirs]
    mine = list(zip(*([OPS[op] for op in layer.ops] for layer in layers), strict=True))
    kinds = sorted(set(orders) | set(mine))
    assert len(kinds) == 6
    assert same_counts([orders.count(kind) for kind in kinds], [mine.count(kind) for kind in kinds]) > LEAST_P
    for place, name in enumerate(names):
        factors = np.concatenate([layer.arguments[layer.ops == OPS.index(name)] for layer in layers])
        assert len(factors) == count
        assert stats.ks_2samp(factors, [float(draw[1 + place]) for draw in theirs]).pvalue > LEAST_P
    assert augmentation(rand_augment=None, color_jitter=0.0).draw_layers(keys_of(4)) == []


def test_boxes_are_drawn_as_timm_draws(monkeypatch):
    count, height, width, probability = 8000, 48, 64, 0.25
    boxes = augmentation(random_erasing=probability).draw_boxes(keys_of(count, seed=4), height, width)
    random.seed(5)
    erasing = timm_erasing.RandomErasing(probability, mode="pixel", device="cpu")
    monkeypatch.setattr(timm_erasing, "_get_pixels", lambda *_, **__: 1.0)
    theirs = []
    for _ in range(count):
        rows, columns = erasing(torch.zeros(1, height, width))[0].numpy().nonzero()
        if len(rows):
            top, left = rows.min(), columns.min()
            theirs.append((top, left, rows.max() - top + 1, columns.max() - left + 1))
    assert same_counts([len(boxes), count - len(boxes)], [len(theirs), count - len(theirs)]) > LEAST_P

    def measures(top, left, box_height, box_width):
        area, ratio = box_height * box_width, np.log(box_height / box_width)
        return area, ratio, top / (height - box_height), left / (width - box_width), top, left

    for mine, others in zip(measures(*boxes[:, 1:5].T), measures(*np.array(theirs).T), strict=True):
        assert stats.ks_2samp(mine, others).pvalue > LEAST_P
    for seeds in boxes[:, 5:].T:
        assert stats.kstest(seeds / 2**32, "uniform").pvalue > LEAST_P
    assert abs(np.corrcoef(boxes[:, 5:].T)[0, 1]) < 4 / math.sqrt(len(boxes))
    assert len(augmentation(random_erasing=0.0).draw_boxes(keys_of(100), 32, 32)) == 0
    assert len(augmentation(random_erasing=1.0).draw_boxes(keys_of(100), 32, 32)) == 100


class GivenDraws:
    """Stands in for Python's `random` in timm's random erasing, with the draws of one key."""

    def __init__(self, key):
        self.key, self.next = key, 3

    def random(self):
        return float(keyed.uniform(self.key, device_augment.ERASE_DRAWS))

    def take(self):
        self.next += 1
        return float(keyed.uniform(self.key, device_augment.ERASE_DRAWS + self.next - 1))

    def uniform(self, low, high):
        if (self.next - 3) % 4 == 2:  # the last try did not fit: its corner was not asked for
            self.next += 2
        return low + (high - low) * self.take()

    def randint(self, low, high):
        return low + int((high - low + 1) * self.take())


@pytest.mark.parametrize(("height", "width"), [(224, 224), (48, 64), (64, 12)])
def test_boxes_of_the_same_draws_are_timms(height, width, monkeypatch):
    keys = keys_of(300, seed=8)
    boxes = augmentation(random_erasing=0.4).draw_boxes(keys, height, width)
    erasing = timm_erasing.RandomErasing(0.4, mode="pixel", device="cpu")
    monkeypatch.setattr(timm_erasing, "_get_pixels", lambda *_, **__: 1.0)
    theirs = []
    for view, key in enumerate(keys):
        monkeypatch.setattr(timm_erasing, "random", GivenDraws(key))
        rows, columns = erasing(torch.zeros(1, height, width))[0].numpy().nonzero()
        if len(rows):
            top, left = rows.min(), columns.min()
            theirs.append([view, top, left, rows.max() - top + 1, columns.max() - left + 1])
    assert boxes[:, :5].tolist() == np.array(theirs).tolist()


# -------------------------------------------------------------------------------------------------- random erasing


def test_boxes_alone_become_noise_of_mean_0_and_std_1():
    images, keys = as_batch(crops(200, 60, 44)), keys_of(200)
    with_boxes, without = (augmentation(random_erasing=share) for share in (1.0, 0.0))
    out, plain = with_boxes(images, keys), without(images, keys)
    noise = []
    for sample, top, left, height, width, *seeds in with_boxes.draw_boxes(keys, 44, 60):
        box = (sample, slice(None), slice(top, top + height), slice(left, left + width))
        y, x = torch.arange(top, top + height).view(-1, 1), torch.arange(left, left + width)
        bits = device_ops.noise_bits(
            (y * 60 + x) * 3 + torch.arange(3).view(3, 1, 1), torch.tensor(seeds).view(1, 1, 1, 2)
        )
        assert torch.equal(out[box], with_boxes.normal[bits >> 16])
        assert not (out[box] == plain[box]).all(0).any()
        noise.append(out[box].flatten(1).numpy())
        plain[box] = out[box]
    assert torch.equal(out, plain)
    values = np.concatenate(noise, axis=1)
    assert abs(values.mean()) < 4 / math.sqrt(values.size)
    assert abs(values.std() - 1) < 4 / math.sqrt(2 * values.size)
    assert stats.kstest(values.ravel()[:20000], "norm").pvalue > LEAST_P
    neighbours = (values[0], values[1]), (values[1], values[2]), (values[0, 1:], values[0, :-1])
    for one, other in neighbours:
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(one.size)
    table = device_ops.normal_table()
    assert abs(table.double().mean()) < 1e-9
    assert abs(table.double().std(correction=0) - 1) < 1e-6


def test_noise_bits_are_those_of_32_bit_arithmetic():
    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    counters, seeds = [0, 1, 2, 150527, 442367], [(0, 0), (2**32 - 1, 2**32 - 1), (123456789, 3987654321)]
    ours = device_ops.noise_bits(torch.tensor(counters), torch.tensor(seeds).unsqueeze(1))
    assert ours.tolist() == [[mix(mix((each + one) % 2**32) ^ two) for each in counters] for one, two in seeds]
    bits = device_ops.noise_bits(torch.arange(100_000), torch.tensor([5, 77])).numpy()
    for shift in (0, 8, 16, 24):
        assert stats.chisquare(np.bincount((bits >> shift) & 255, minlength=256)).pvalue > LEAST_P


# ------------------------------------------------------------------------------------------------------ end to end


@pytest.mark.parametrize("text", [PUBLISHED, None])
def test_means_and_spreads_agree_with_timms_chain(text):
    count, size = 400, 48
    images = crops(count, size, size)
    ours = augmentation(rand_augment=text)(as_batch(images), keys_of(count, seed=6))
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    second, last = timm_last({"rand_augment": text, "random_erasing": 0.25}, size)
    theirs = torch.stack([last(second(image)) for image in images])
    for statistic in (lambda x: x.mean((2, 3)), lambda x: x.std((2, 3))):
        mine, others = statistic(ours), statistic(theirs)
        error = ((mine.var(0) + others.var(0)) / count).sqrt()
        assert ((mine.mean(0) - others.mean(0)).abs() < 4 * error).all()
        for channel in range(3):
            assert stats.ks_2samp(mine[:, channel], others[:, channel]).pvalue > LEAST_P


@pytest.mark.parametrize(
    "text", ["augmix-m5-w4-d2", "original-mstd0.5", "v0", "rand-m9-tweights", "rand-m9-t3a", "rand-t3aw", "rands-m9"]
)
def test_other_policies_are_refused_with_the_key_and_the_way_out(text):
    with pytest.raises(ValueError, match=r"augment\.rand_augment .*augment\.where=host"):
        augmentation(rand_augment=text)


def test_what_timm_cannot_read_is_refused():
    with pytest.raises(ValueError, match=r"augment\.rand_augment 'rand-q9'"):
        augmentation(rand_augment="rand-q9")
