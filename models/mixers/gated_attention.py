"""Attention with a gate of any kind at any place (arXiv 2505.06708 and 2306.12929).

Shape suffixes: B batch, T sequence, D model width, H heads, V value width of a head.
"""

import dataclasses

from torch import Tensor

from models.config import default
from models.context import LayerContext
from models.mixers.attention import Attention, AttentionConfig
from models.mixers.gates.base import GateConfig, Heads
from models.slots import Mixer
from models.state import OwnTokens, Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class GatedAttentionConfig(AttentionConfig, kind="gated_attention"):
    """Softmax attention with a gate (Qiu et al., arXiv 2505.06708; Bondarenko et al., arXiv 2306.12929).

    gate: what is gated, and by what. The rest is as in attention, whose output_gate may be there as well.
    """

    gate: GateConfig = default(GateConfig, "output")

    def build(self, ctx: LayerContext) -> Mixer:
        return GatedAttention(self, ctx, self.built_head_dim(ctx.d_model))


class GatedAttention(Attention):
    def __init__(self, config: GatedAttentionConfig, ctx: LayerContext, head_dim: int) -> None:
        super().__init__(config, ctx, head_dim)
        kv_heads, _ = config.value_shape(ctx.d_model)
        self.gated = config.gate.build(Heads(ctx.d_model, config.num_heads, kv_heads, head_dim))

    def own_tokens(self, views: Views, inputs: State, side: Side) -> OwnTokens:
        return self.gated.own_tokens(views)

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        return self.gated.project(super().project(views, inputs, side), views, inputs)

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return self.gated.merged(super().merge(self.gated.mixed(out_BTHV, kept), kept), kept)

    def drop_values(self) -> None:
        super().drop_values()
        self.gated.drop_values()
