"""Maps of chosen stages, as `features_only=True` gives them to other libraries."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from timm.models._features import FeatureGetterNet

from pipeline.models.hornet import HorNet


class StageMaps(FeatureGetterNet):
    """timm's wrapper round `HorNet.forward_intermediates`, which also gives all stages to who asks by `return_layers`.

    transformers (5.24, `TimmBackbone` with `output_hidden_states`) sets that attribute to the names of all stages for
    one pass, and back. timm's own wrapper of models without a plain sequence of modules does not know it.
    """

    out_indices: list[int]  # type: ignore[assignment]
    model: HorNet

    @property
    def return_layers(self) -> dict[str, str]:
        """Module name of each stage whose map is returned -> its number."""
        return {f"stages.{i}": str(i) for i in self.out_indices}

    @return_layers.setter
    def return_layers(self, layers: Mapping[str, str] | Collection[str]) -> None:
        # Of stages that are there: those behind the last one asked for at first were left out.
        self.out_indices = [i for i in range(len(self.model.stages)) if f"stages.{i}" in layers]
