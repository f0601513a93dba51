"""What a block asks the host to launch: at most half of what it was when each layer cast and folded for itself."""

import pytest

from tests.support.launches import of_block, of_pass

# Dispatched by a block of the build before (tests/bench/bench_launches.py), by the same counter.
FORMER = {
    (False, False): {"none": 130.5, "selective": 146.5, "selective_mlp": 147.5, "block": 192.75, "stage": 193},
    (True, False): {"none": 180.75, "selective": 188.75, "selective_mlp": 189.75, "block": 245.75, "stage": 246.5},
    (False, True): {"none": 129.75, "selective": 129.75, "selective_mlp": 130.75, "block": 174.75, "stage": 175},
    (True, True): {"none": 168.75, "selective": 168.75, "selective_mlp": 169.75, "block": 224.75, "stage": 225.5},
}


@pytest.mark.parametrize("with_kernels", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize("gf", [False, True], ids=["7x7", "gf"])
def test_a_block_dispatches_half(gf: bool, with_kernels: bool) -> None:
    for policy, former in FORMER[gf, with_kernels].items():
        found = of_block(gf, policy, with_kernels)
        assert 0 < found <= former / 2, policy


def test_weights_are_cast_for_all_blocks_at_once() -> None:
    """None of a weight by itself: four blocks more have not one operation of the kind more."""
    few, many = (of_pass(False, "selective", True, [1, 1, depth, 1]) for depth in (2, 6))
    assert many["_to_copy"] == few["_to_copy"]
    assert many["_foreach_copy_"] == few["_foreach_copy_"]
