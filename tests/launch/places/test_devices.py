"""CUDA_VISIBLE_DEVICES as CUDA reads it, and what nvidia-smi lists."""

from __future__ import annotations

import pytest
import torch

from launch.places.devices import Gpu, parse_listing, shared_gpu_note, visible_devices
from launch.places.settings import SettingError

A, B = "GPU-aaaa1111-2222-3333-4444-555566667777", "GPU-aaab1111-2222-3333-4444-555566667777"
M, N = "MIG-mmmmmmmm-2222-3333-4444-555566667777", "MIG-nnnnnnnn-2222-3333-4444-555566667777"
TWO = [Gpu(A, []), Gpu(B, [])]
NONE = "there is no nvidia-smi"
DIVIDED = [Gpu(A, [M, N]), Gpu(B, [])]
LISTING = f"""\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: {A})
  MIG 3g.20gb     Device  0: (UUID: {M})
  MIG 3g.20gb     Device  1: (UUID: {N})
GPU 1: NVIDIA A100-SXM4-40GB (UUID: {B})
"""


def visible(value: str | None, gpus: list[Gpu]) -> tuple[list[str], list[str]]:
    names, _, notes = visible_devices({} if value is None else {"CUDA_VISIBLE_DEVICES": value}, gpus, NONE)
    return names, notes


def test_the_listing_is_read() -> None:
    assert parse_listing(LISTING) == DIVIDED
    assert parse_listing("No devices were found\n") == []
    assert parse_listing("GPU 0: a name (of brackets)\n") == [Gpu("", [])]


@pytest.mark.parametrize(
    ("value", "gpus", "names"),
    [
        (None, TWO, ["0", "1"]),
        (None, [], []),
        (None, DIVIDED, [M, N, B]),
        ("1", TWO, ["1"]),
        ("1,0", TWO, ["1", "0"]),
        (" 0, 1 ", TWO, ["0", "1"]),
        ("0,1,", TWO, ["0", "1"]),
        ("00", TWO, ["0"]),
        (f"{B},{A}", TWO, [B, A]),
        ("GPU-aaab,GPU-aaaa", TWO, [B, A]),  # CUDA takes the beginning of a UUID
        (N, DIVIDED, [N]),
        ("MIG-n,MIG-m", DIVIDED, [N, M]),
        ("1", DIVIDED, ["1"]),
        ("", [], []),
        ("-1", [], []),
    ],
)
def test_what_is_visible(value: str | None, gpus: list[Gpu], names: list[str]) -> None:
    assert visible(value, gpus) == (names, [])


@pytest.mark.parametrize("value", ["1,0", " 0, 1 ", "0,1,", "0,-1,1", "-1", "", f"{B},{A}", f"{A}", "0,0"])
def test_torch_reads_it_alike(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    try:
        names, _ = visible(value, TWO)
    except SettingError:
        names = []
    assert [str(device) for device in torch.cuda._parse_visible_devices()] == names


def test_a_driver_that_fails_is_told_of() -> None:
    names, _, notes = visible_devices({}, [], "nvidia-smi: Failed to initialize NVML")
    assert (names, notes) == ([], ["no GPU is used: nvidia-smi: Failed to initialize NVML"])


@pytest.mark.parametrize("value", ["", " ", ",", "-1", "-1,0", "NoDevFiles", "none"])
def test_none_is_none_and_said(value: str) -> None:
    names, (note,) = visible(value, TWO)
    assert names == []
    assert "the ranks run on the CPU" in note


@pytest.mark.parametrize("value", ["0,-1,1", "0,-1"])
def test_the_list_ends_at_what_is_negative(value: str) -> None:
    names, (note,) = visible(value, TWO)
    assert names == ["0"]
    assert f"{value} ends at -1, as CUDA reads it: 1 GPU" in note


@pytest.mark.parametrize(
    ("value", "gpus", "said"),
    [
        ("2", TWO, "has 2, and this host has 2 GPUs: 0 to 1"),
        ("0,7", TWO, "has 7"),
        ("0,0", TWO, "names 0 twice"),
        ("GPU-aaaa,GPU-aaaa1", TWO, "names GPU-aaaa1 twice"),
        ("GPU-aaa", TWO, "which 2 devices of this host begin with"),
        ("GPU-bbb", TWO, "which no device of this host has"),
        (f"0,{B}", TWO, "CUDA takes no mix"),
        (f"{M},{B}", DIVIDED, "CUDA takes no mix"),
        ("MIG-x", TWO, "which no device of this host has"),
        ("0", DIVIDED, "a GPU that is divided: name its MIG devices"),
        (A, DIVIDED, "a GPU that is divided: name its MIG devices"),
        ("0,,1", TWO, "has an empty place"),
        ("two", TWO, "has two: neither a number nor a UUID"),
        ("1gpu", TWO, "has 1gpu: neither a number nor a UUID"),
        ("²", TWO, "has ²: neither a number nor a UUID"),
        ("0", [], "this host has no GPU (there is no nvidia-smi): for the CPU, CUDA_VISIBLE_DEVICES= (empty)"),
        (A, [], "this host has no GPU"),
    ],
)
def test_what_cannot_be_meant(value: str, gpus: list[Gpu], said: str) -> None:
    with pytest.raises(SettingError) as error:
        visible(value, gpus)
    assert said in str(error.value)
    assert "CUDA_VISIBLE_DEVICES" in str(error.value)
    assert "\n" not in str(error.value)


def test_two_ranks_on_one_gpu_are_told_of() -> None:
    (note,) = shared_gpu_note([M, N], DIVIDED)
    assert "GPU 0" in note
    assert shared_gpu_note([M, B], DIVIDED) == shared_gpu_note(["0", "1"], TWO) == []
