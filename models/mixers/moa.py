"""Mixture of attention heads: a token runs the few heads that a router picks for it (arXiv 2210.05144).

Shape suffixes: B batch, T sequence, D model width, E experts (heads), K picks, N = B*T tokens, P = N*K rows, V width of
a head.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Self

from torch import Tensor

from models.config import default
from models.context import LayerContext
from models.ffn.dispatch import LocalDispatch, Matrices
from models.ffn.routing import RouterConfig
from models.kernels.combine import Combine
from models.kernels.grouped_mm import GroupedMM
from models.kernels.picks import of_picks
from models.mixers.attention import Attention, AttentionConfig
from models.slots import Mixer, MixerConfig
from models.state import OwnTokens, Projected, Side, State, Views

GATES = "head_gates"
INDEX = "head_index"


@dataclasses.dataclass(frozen=True)
class MixtureOfHeadsConfig(MixerConfig, kind="moa"):
    """Mixture of attention heads (Zhang et al., arXiv 2210.05144): each token runs some of num_heads query heads.

    Each head has its own query and output matrix; all share one key and one value per token. router: which heads, and
    with what weight. head_dim: default d_model / the heads that a token runs. rope, rope_theta, qk_norm, window: as in
    attention.
    """

    num_heads: int
    router: RouterConfig = default(RouterConfig, "moa_top_k")
    head_dim: int | None = None
    rope: Literal["half", "interleaved", "none"] = "half"
    rope_theta: float = 10000.0
    qk_norm: bool = False
    window: int | None = None

    key_gate = True
    unseen = True
    example = MappingProxyType(
        {"num_heads": 8, "head_dim": 4, "router": {"kind": "moa_top_k", "top_k": 2, "variation_coef": 0.02}}
    )

    def __post_init__(self) -> None:
        self.attention(self.head_dim)
        self.router.picks(self.num_heads)
        if not (self.router.causal and self.router.incremental and self.router.batch_independent):
            raise ValueError(
                f"router {self.router.kind} looks at other tokens to choose a token's heads; use one that looks at the "
                f"token alone{RouterConfig.such_as(lambda kind: kind.causal and kind.incremental)}"
            )

    @property
    def picks(self) -> int:
        """The most heads that a token runs."""
        return math.ceil(self.router.picks(self.num_heads))

    def attention(self, width: int | None) -> AttentionConfig:
        """All heads, of this width, as attention to one shared key and value."""
        return AttentionConfig(
            num_heads=self.num_heads,
            num_kv_heads=1,
            head_dim=width,
            rope=self.rope,
            rope_theta=self.rope_theta,
            qk_norm=self.qk_norm,
            window=self.window,
        )

    def width(self, d_model: int) -> int:
        """Of a head. Raises ValueError where d_model says none."""
        if self.head_dim is None and d_model % self.picks:
            raise ValueError(f"d_model {d_model} is not a multiple of the {self.picks} heads of a token; give head_dim")
        return self.head_dim or d_model // self.picks

    def canonical(self, d_model: int) -> Self:
        theta = MixtureOfHeadsConfig.rope_theta if self.rope == "none" else self.rope_theta
        router = self.router.canonical(d_model)
        return dataclasses.replace(self, head_dim=self.width(d_model), rope_theta=theta, router=router)

    def build(self, ctx: LayerContext) -> Mixer:
        inner = self.attention(self.width(ctx.d_model))
        return MixtureOfHeads(self, inner, ctx, inner.built_head_dim(ctx.d_model))

    def value_shape(self, d_model: int) -> tuple[int, int]:
        return 1, self.width(d_model)

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        picked = dataclasses.replace(self.attention(self.width(d_model)), num_heads=self.picks)
        return picked.flops_per_token(d_model, sequence)

    def idle(self, d_model: int) -> int:
        return 2 * (self.num_heads - self.picks) * self.width(d_model) * d_model


class MixtureOfHeads(Attention):
    """Of a rank's heads a token runs as many as it may pick, those of the largest gates. Its k-th pick is then its k-th
    head, which is all the same to the core, because keys and values are shared. Where a rank has no more heads than
    that they all run, and gates of 0 take out what was not picked."""

    def __init__(self, config: MixtureOfHeadsConfig, inner: AttentionConfig, ctx: LayerContext, head_dim: int) -> None:
        super().__init__(inner, ctx, head_dim)
        self.picks, self.has_losses = config.picks, config.router.has_losses
        self.router = config.router.build(ctx.d_model, config.num_heads)
        self.dispatch, self.combine = LocalDispatch(), Combine()
        self.grouped_mm = GroupedMM(ctx.d_model, head_dim)

    def own_tokens(self, views: Views, inputs: State, side: Side) -> OwnTokens:
        routing, losses, load_E = self.router(views.q_BTD, side)
        weights_BTK = routing.weights_BTK
        if routing.keep_BTK is not None:
            weights_BTK = weights_BTK.masked_fill(~routing.keep_BTK, 0)
        gates_BTE = weights_BTK.new_zeros(routing.logits_BTE.shape).scatter(-1, routing.index_BTK, weights_BTK)
        return OwnTokens(made_by_head={GATES: gates_BTE}, losses=losses, stats={"expert_load": load_E})

    def slots(self, heads: int, side: Side) -> int:
        """How many of a rank's heads a token runs: its picks at most, which ranks that split the sequence deal out."""
        ranks = 1 if side.window is None else side.tokens.shape[1] // side.window[1]
        return min(heads, -(-self.picks // ranks) * ranks)

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        gates_BTE = inputs[GATES]
        slots = self.slots(gates_BTE.shape[-1], side)
        if slots == gates_BTE.shape[-1]:
            projected = super().project(views, inputs, side)
            return projected._replace(kept={GATES: gates_BTE})
        # The picks are the largest gates: what is worth 0, as a pick whose probability underflows, adds nothing.
        gates_BTK, index_BTK = gates_BTE.topk(slots, dim=-1)
        heads_EDV = self.q.weight.unflatten(0, (-1, self.head_dim)).mT
        q_PV, places_NK = self.dispatch(
            views.q_BTD.flatten(0, 1), index_BTK.flatten(0, 1), None, Matrices(self.grouped_mm, heads_EDV)
        )
        q_BTKV = of_picks(q_PV, places_NK).view(*index_BTK.shape, self.head_dim)
        k = self.k(views.k_BTD).unflatten(-1, (-1, self.head_dim))
        v = self.v(views.v_BTD).unflatten(-1, (-1, self.head_dim))
        q_BTKV, k = self.sized(q_BTKV, k)
        return Projected({"q": q_BTKV, "k": k, "v": v}, {GATES: gates_BTK, INDEX: index_BTK})

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        if INDEX not in kept:
            gated_BTHV = out_BTHV * kept[GATES][..., None].to(out_BTHV.dtype)
            return self.o(gated_BTHV.flatten(-2))
        heads_EVD = self.o.weight.unflatten(1, (-1, self.head_dim)).permute(1, 2, 0)
        y_PD, places_P1 = self.dispatch(
            out_BTHV.flatten(0, 2), kept[INDEX].view(-1, 1), None, Matrices(self.grouped_mm, heads_EVD)
        )
        gates_NK = kept[GATES].flatten(0, 1)
        out_ND = self.combine(y_PD, gates_NK, places_P1.view_as(gates_NK))
        return out_ND.view(*out_BTHV.shape[:2], y_PD.shape[-1])

    def after_step(self, stats: Mapping[str, Tensor]) -> None:
        self.router.after_step(stats)
