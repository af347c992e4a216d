"""Multi-head latent attention: keys and values of all heads are made from one small vector per token.

Shape suffixes: B batch, T queries, S keys, D model width, H heads, K and V width of a head's key and value, P width of
the key that heads share, C width of the latent, N = K + P, E = C + P.
"""

import dataclasses
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.context import LayerContext
from models.kernels.attention import Softmax, as_bias, as_gated_bias, attend, visibility
from models.limits import at_least
from models.params import Axis, Linear, RMSNorm, upcast
from models.rope import angles, rotate_half, rotate_interleaved
from models.slots import Cache, Mixer, MixerConfig
from models.state import ALL_VALUES, KEY_GATE, OwnTokens, Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class MLAConfig(MixerConfig, kind="mla"):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    head_dim: width of a head's own part of queries and keys. value_dim: of its values. shared_dim: of the part of the
    key that all heads share, which is the one that rope turns. latent_dim: of the vector that keys and values are made
    of. query_latent_dim: of the one that queries are made of; null makes them from the input. rope: pairing of the
    turned channels, or none (Kimi Linear, arXiv 2510.26692).

    A gated key is seen by that much less, as in attention.
    """

    num_heads: int
    head_dim: int = 128
    value_dim: int = 128
    shared_dim: int = 64
    latent_dim: int = 512
    query_latent_dim: int | None = None
    rope: Literal["interleaved", "half", "none"] = "interleaved"
    rope_theta: float = 10000.0

    key_gate = True
    unseen = True
    example = MappingProxyType({"num_heads": 4, "head_dim": 4, "value_dim": 4, "shared_dim": 2, "latent_dim": 6})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "head_dim", "value_dim", "shared_dim", "latent_dim", "query_latent_dim")
        at_least(self, 1, "rope_theta", hint=", and 10000 is usual")
        if self.rope != "none" and self.shared_dim % 2:
            raise ValueError(f"shared_dim is {self.shared_dim}, and rope turns pairs; make it even, or use rope none")

    def canonical(self, d_model: int) -> "MLAConfig":
        return self if self.rope != "none" else dataclasses.replace(self, rope_theta=MLAConfig.rope_theta)

    def build(self, ctx: LayerContext) -> Mixer:
        return MLA(self, ctx)

    def value_shape(self, d_model: int) -> tuple[int, int]:
        return self.num_heads, self.value_dim

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        return 2 * self.num_heads * (self.head_dim + self.shared_dim + self.value_dim) * sequence / 2


class MLA(Mixer):
    """Latents are made once per token. Each head makes its keys and values from them, and decoding needs neither: the
    cache holds latents and shared keys. With values that other layers had a part in, it holds those too."""

    in_place = True
    value_views = ()  # keys come from them too

    def __init__(self, config: MLAConfig, ctx: LayerContext) -> None:
        super().__init__()
        self.config, heads = config, config.num_heads
        self.softmax = Softmax()
        self.own_values = ctx.own_values
        self.width = config.head_dim + config.shared_dim
        self.query_gain = ctx.attention_gain(self.width)
        axis, width = Axis("heads", heads), config.head_dim + config.shared_dim
        self.q_latent = self.q_norm = None
        if config.query_latent_dim is not None:
            self.q_latent = Linear(ctx.d_model, config.query_latent_dim)
            self.q_norm = RMSNorm(config.query_latent_dim, ctx.norm_eps)
        # A wider model has no wider latents, unless it says so.
        wide = config.query_latent_dim is None
        self.q = Linear(config.query_latent_dim or ctx.d_model, heads * width, axis=axis, wide=wide)
        self.latent = Linear(ctx.d_model, config.latent_dim)
        self.latent_norm = RMSNorm(config.latent_dim, ctx.norm_eps)
        self.shared_key = Linear(ctx.d_model, config.shared_dim)
        self.k = Linear(config.latent_dim, heads * config.head_dim, axis=axis, wide=False)
        self.v = Linear(config.latent_dim, heads * config.value_dim, axis=axis, wide=False)
        self.o = Linear(heads * config.value_dim, ctx.d_model, in_axis=axis, init=ctx.output_init)

    def own_tokens(self, views: Views, inputs: State, side: Side) -> OwnTokens:
        made = {"latent": self.latent_norm(self.latent(views.v_BTD)), "shared_key": self.shared_key(views.k_BTD)}
        if self.q_latent is not None and self.q_norm is not None:
            made["q_latent"] = self.q_norm(self.q_latent(views.q_BTD))
        return OwnTokens(made)

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        q_BTHN = self.q(inputs.get("q_latent", views.q_BTD)).unflatten(-1, (-1, self.width))
        heads = {
            "q": q_BTHN if self.query_gain == 1 else q_BTHN * self.query_gain,
            "v": self.v(inputs["latent"]).unflatten(-1, (-1, self.config.value_dim)),
            "latent": inputs["latent"][:, :, None],
            "shared_key": inputs["shared_key"][:, :, None],
        }
        return Projected(heads, {})

    def core_weights(self) -> dict[str, Tensor]:
        """Keys are made in the core, so that context ranks exchange latents."""
        return {"k": self.k.weight.unflatten(0, (-1, self.config.head_dim))}

    def core(
        self, heads: dict[str, Tensor], weights: dict[str, Tensor], side: Side, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        positions_BT, gate_BS, w_HKC = side.positions_BT, heads.get(KEY_GATE), weights["k"]
        q_BTHN, shared_BS1P = self.turn(heads["q"], heads["shared_key"], positions_BT)
        new = {"latent": heads["latent"], "shared_key": shared_BS1P}
        if self.sequence is not None:
            k_BTHN = self.keys(new, w_HKC)
            found = self.sequence.attend(q_BTHN, k_BTHN, heads["v"], gate_BS, side.positions, side.documents, None)
            return found[0], None
        if cache is None and gate_BS is None:
            documents_BT = None if side.documents is None else side.documents_BT
            k_BSHN = self.keys(new, w_HKC)
            return self.softmax.causal(q_BTHN, k_BSHN, heads["v"], positions_BT, documents_BT, None), None
        documents_BT = side.documents_BT if side.documents is not None else torch.zeros_like(positions_BT)
        assert documents_BT is not None
        new |= {"positions": positions_BT, "documents": documents_BT}
        new |= {} if self.own_values or ALL_VALUES in heads else {"v": heads["v"]}
        new |= {} if gate_BS is None else {KEY_GATE: gate_BS}
        if not cache and side.documents is None and gate_BS is None:
            return self.softmax.causal(q_BTHN, self.keys(new, w_HKC), heads["v"], positions_BT, None, None), new
        seen = {name: torch.cat([cache[name], x], 1) for name, x in new.items()} if cache else new
        visible_BTS = visibility(positions_BT, documents_BT, seen["positions"], seen["documents"], None)
        if gate_BS is None:
            bias_BTS = as_bias(visible_BTS, q_BTHN.dtype)
        else:
            distance_BTS = positions_BT[:, :, None] - seen["positions"][:, None]
            bias_BTS = as_gated_bias(visible_BTS, distance_BTS, seen[KEY_GATE], q_BTHN.dtype)
        if cache and self.own_values:
            return self.attend_latents(q_BTHN, seen, w_HKC, bias_BTS), seen
        v_BSHV = heads.get(ALL_VALUES, seen.get("v", heads["v"]))
        return attend(q_BTHN, self.keys(seen, w_HKC), v_BSHV, bias_BTS), None if cache is None else seen

    def turn(self, q_BTHN: Tensor, shared_BT1P: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and the shared key with their positions."""
        config = self.config
        if config.rope == "none":
            return q_BTHN, shared_BT1P
        rotate = rotate_half if config.rope == "half" else rotate_interleaved
        dtype = upcast(q_BTHN[:0]).dtype
        cos, sin = angles(positions_BT, config.shared_dim, config.rope_theta, dtype)
        own, shared = q_BTHN.split([config.head_dim, config.shared_dim], -1)
        return torch.cat([own, rotate(shared, cos, sin)], -1), rotate(shared_BT1P, cos, sin)

    def keys(self, seen: Cache, w_HKC: Tensor) -> Tensor:
        """[B, S, H, N]. There may be several latents and shared keys, each for as many heads."""
        latents, keys, width = seen["latent"].unbind(2), seen["shared_key"].unbind(2), w_HKC.shape[1]
        made = []
        for c_BSC, shared_BSP, own_HKC in zip(latents, keys, w_HKC.chunk(len(latents)), strict=True):
            k_BSHK = F.linear(c_BSC, own_HKC.flatten(0, 1)).unflatten(-1, (-1, width))
            made.append(torch.cat([k_BSHK, shared_BSP[:, :, None].expand(-1, -1, k_BSHK.shape[2], -1)], -1))
        return torch.cat(made, 2) if len(made) > 1 else made[0]

    def attend_latents(self, q_BTHN: Tensor, seen: Cache, w_HKC: Tensor, bias_BTS: Tensor) -> Tensor:
        """Without keys and values of heads: q (W c) = (q W) c, and a mean of values is a value of mean latents. So all
        heads attend to one key, (latent, shared key), and one value, the latent."""
        config = self.config
        own, shared = q_BTHN.split([config.head_dim, config.shared_dim], -1)
        q_BTHE = torch.cat([torch.einsum("bthk,hkc->bthc", own, w_HKC), shared], -1)
        q_BTHE = q_BTHE * (q_BTHE.shape[-1] / q_BTHN.shape[-1]) ** 0.5  # `attend` divides by the root of its own width
        k_BS1E = torch.cat([seen["latent"], seen["shared_key"]], -1)
        mean_BTHC = attend(q_BTHE, k_BS1E, seen["latent"], bias_BTS)
        v_HVC = self.v.weight.unflatten(0, (-1, config.value_dim))
        return torch.einsum("bthc,hvc->bthv", mean_BTHC, v_HVC)

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return self.o(out_BTHV.flatten(-2))
