"""Sparse value residual: chosen layers add the first layer's values to their own (ResFormer, arXiv 2410.17897)."""

import dataclasses
from types import MappingProxyType

from models.context import LayerContext
from models.slots import Values, ValuesConfig
from models.values.resformer import ConstantMix, FirstValue


@dataclasses.dataclass(frozen=True)
class SparseResFormerValues(ValuesConfig, kind="resformer_sparse"):
    """Constant weights in some layers; the others keep their own values.

    layers: those that add, counted from 0; the paper takes the last ones, 5 to 7 of 8. lambda1: of the first layer's
    values, 5 in the paper. lambda2: of the layer's own.
    """

    layers: tuple[int, ...]
    lambda1: float = 5.0
    lambda2: float = 1.0

    crosses_layers = True
    example = MappingProxyType({"layers": [1]})

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 1:
            raise ValueError(
                f"layers is {list(self.layers)}; it names at least one layer, and none before layer 1: layer 0 makes "
                "the values that the others add"
            )

    def build(self, ctx: LayerContext, value_shape: tuple[int, int]) -> Values:
        if max(self.layers) >= ctx.num_layers:
            raise ValueError(
                f"values.layers names layer {max(self.layers)} and the last one is {ctx.num_layers - 1}; remove it"
            )
        if ctx.index == 0:
            return FirstValue(value_shape)
        return ConstantMix(self.lambda1, self.lambda2) if ctx.index in self.layers else Values()
