"""Which layer a parameter belongs to, for layer-wise learning-rate decay.

Source: the published fine-tuning recipe, a depth scale of 12.
"""

import re

LAYERS = 12


def layer_of(name: str, coarse: bool = False) -> int:
    """Layer of the parameter `name`.

    Fine: the published 14 layers. Stem 0; stages 1 and 2 are one layer each; stage 3 goes up by one every two blocks;
    stage 4 is 12; norm and head are 13. Each downsampling belongs to the stage it leads to, that of stage 3 to its
    first layer. Coarse: stem, four stages, head.
    """
    match = re.match(r"(downsample_layers|stages)\.(\d)\.(\d+)", name)
    if match is None:
        return 5 if coarse else LAYERS + 1
    is_downsampling, stage = match[1] == "downsample_layers", int(match[2])
    if is_downsampling and stage == 0:
        return 0
    if coarse or stage < 2:
        return stage + 1
    if stage == 3:
        return LAYERS
    block = 0 if is_downsampling else int(match[3])
    return min(3 + block // 2, LAYERS - 1)


def layer_within(name: str, prefix: str, coarse: bool = False) -> int:
    """`layer_of` in a model where a HorNet stands under `prefix`: what is not its own has the layer of its head."""
    own = name.removeprefix(prefix) if name.startswith(prefix) else "head"
    return layer_of(own, coarse)
