"""Softmax attention: grouped queries, rotary positions, optional QK-norm, sliding window and output gate.

Shape suffixes: B batch, T queries, S keys, D model width, H query heads, J key/value heads, K key and V value width.
"""

import dataclasses
from types import MappingProxyType
from typing import Literal, Self

import torch
from torch import Tensor

from models.context import LayerContext
from models.kernels.attention import Attend, AttendInParts, Softmax, as_bias, as_gated_bias, visibility
from models.limits import at_least, head_width, shared_out
from models.params import Axis, Linear, RMSNorm
from models.rope import angles, rotate_half, rotate_interleaved
from models.slots import Cache, Mixer, MixerConfig
from models.state import ALL_VALUES, KEY_GATE, Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class AttentionConfig(MixerConfig, kind="attention"):
    """Causal softmax attention (Vaswani et al.; GQA: arXiv 2305.13245; gate: arXiv 2505.06708).

    head_dim: default d_model / num_heads. rope: pairing of the rotated channels, or none. rope_fraction: share of the
    head's channels that are rotated. qk_norm: RMSNorm per head on queries and keys before rotation.
    window: a query sees itself and the window - 1 tokens before it. output_gate: element-wise sigmoid of the input.
    qkv_bias: biases on queries, keys and values (Qwen2, arXiv 2407.10671).
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope: Literal["half", "interleaved", "none"] = "half"
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0
    qk_norm: bool = False
    window: int | None = None
    output_gate: bool = False
    qkv_bias: bool = False

    key_gate = True
    unseen = True
    example = MappingProxyType({"num_heads": 8, "num_kv_heads": 4, "head_dim": 4})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "num_kv_heads", "head_dim")
        at_least(self, 1, "window", hint=", or null for no window")
        # Below 1 later pairs of channels turn faster than the first, in the end by more than float32 holds.
        at_least(self, 1, "rope_theta", hint=", and 10000 is usual")
        shared_out(self.num_heads, self.num_kv_heads)
        if not 0 < self.rope_fraction <= 1:
            raise ValueError(f"rope_fraction is {self.rope_fraction}; it must lie in (0, 1]")

    def canonical(self, d_model: int) -> Self:
        kv_heads, head_dim = self.value_shape(d_model)
        same = dataclasses.replace(self, num_kv_heads=kv_heads, head_dim=head_dim)
        if self.rope != "none":
            return same
        return dataclasses.replace(same, rope_theta=AttentionConfig.rope_theta, rope_fraction=1.0)

    def build(self, ctx: LayerContext) -> Mixer:
        return Attention(self, ctx, self.built_head_dim(ctx.d_model))

    def built_head_dim(self, d_model: int) -> int:
        """A head's width. Raises ValueError where it does not fit d_model or the rotation."""
        head_dim = head_width(d_model, self.num_heads, self.head_dim)
        rotated = int(head_dim * self.rope_fraction)
        if self.rope != "none" and (rotated % 2 or not rotated):
            raise ValueError(
                f"rope would turn {rotated} of a head's {head_dim} channels, and it turns pairs; "
                "change head_dim or rope_fraction, or use rope none"
            )
        return head_dim

    def value_shape(self, d_model: int) -> tuple[int, int]:
        return self.num_kv_heads or self.num_heads, self.head_dim or d_model // self.num_heads

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        head_dim = self.head_dim or d_model // self.num_heads
        seen = sequence / 2 if self.window is None else min(self.window, sequence / 2)
        return 4 * self.num_heads * head_dim * seen


class Attention(Mixer):
    """`reading` is what a relative of softmax attention has of its own; it then has no `softmax`."""

    in_place = True

    def __init__(self, config: AttentionConfig, ctx: LayerContext, head_dim: int) -> None:
        super().__init__()
        self.config, self.head_dim = config, head_dim
        self.softmax: Softmax | None = Softmax()
        heads, (kv_heads, _) = config.num_heads, config.value_shape(ctx.d_model)
        axis, kv_axis = Axis("heads", heads), Axis("kv_heads", kv_heads)
        self.q = Linear(ctx.d_model, heads * head_dim, axis=axis, bias=config.qkv_bias)
        self.k = Linear(ctx.d_model, kv_heads * head_dim, axis=kv_axis, bias=config.qkv_bias)
        self.v = Linear(ctx.d_model, kv_heads * head_dim, axis=kv_axis, bias=config.qkv_bias)
        self.o = Linear(heads * head_dim, ctx.d_model, in_axis=axis, init=ctx.output_init)
        self.gate = Linear(ctx.d_model, heads * head_dim, axis=axis) if config.output_gate else None
        # Normed queries and keys have no size that a width could change.
        self.query_gain = 1.0 if config.qk_norm else ctx.attention_gain(head_dim)
        self.q_norm = RMSNorm(head_dim, ctx.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, ctx.norm_eps) if config.qk_norm else None

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        q = self.q(views.q_BTD).unflatten(-1, (-1, self.head_dim))
        k = self.k(views.k_BTD).unflatten(-1, (-1, self.head_dim))
        v = self.v(views.v_BTD).unflatten(-1, (-1, self.head_dim))
        q, k = self.sized(q, k)
        kept = {} if self.gate is None else {"gate": self.gate(views.q_BTD)}
        return Projected({"q": q, "k": k, "v": v}, kept)

    def sized(self, q_BTHK: Tensor, k_BTJK: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, normed or in the size that the model's scaling gives them."""
        if self.q_norm is not None and self.k_norm is not None:
            return self.q_norm(q_BTHK), self.k_norm(k_BTJK)
        return (q_BTHK if self.query_gain == 1 else q_BTHK * self.query_gain), k_BTJK

    def reading(self, heads: dict[str, Tensor], weights: dict[str, Tensor]) -> Attend:
        """From scores to outputs. heads, weights: as `core` sees them, before positions."""
        assert self.softmax is not None, "what has no softmax reads in its own way"
        return self.softmax

    def turned(self, q_BTHK: Tensor, k_BTJK: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys with their positions."""
        config = self.config
        if config.rope == "none":
            return q_BTHK, k_BTJK
        rotate = rotate_half if config.rope == "half" else rotate_interleaved
        rotated = int(self.head_dim * config.rope_fraction)
        dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
        cos, sin = angles(positions_BT, rotated, config.rope_theta, dtype)
        return rotate(q_BTHK, cos, sin), rotate(k_BTJK, cos, sin)

    def core(
        self, heads: dict[str, Tensor], weights: dict[str, Tensor], side: Side, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        read, positions_BT, window = self.reading(heads, weights), side.positions_BT, self.config.window
        q_BTHK, k_BSJK = self.turned(heads["q"], heads["k"], positions_BT)
        v_BSJV, gate_BS = heads["v"], heads.get(KEY_GATE)
        if self.sequence is not None:
            assert isinstance(read, AttendInParts)
            found = self.sequence.attend(q_BTHK, k_BSJK, v_BSJV, gate_BS, side.positions, side.documents, window)
            return read.beside(*found), None
        if cache is None and gate_BS is None:
            documents_BT = None if side.documents is None else side.documents_BT
            return read.causal(q_BTHK, k_BSJK, v_BSJV, positions_BT, documents_BT, window), None
        documents_BS = side.documents_BT if side.documents is not None else torch.zeros_like(positions_BT)
        assert documents_BS is not None
        keys: Cache = {"k": k_BSJK, "v": v_BSJV, "positions": positions_BT, "documents": documents_BS}
        if ALL_VALUES in heads:
            del keys["v"]
        if gate_BS is not None:
            keys[KEY_GATE] = gate_BS
        if not cache and side.documents is None and window is None and gate_BS is None:
            # A prompt needs no mask of T x T elements.
            return read.causal(q_BTHK, k_BSJK, v_BSJV, positions_BT, None, None), keys
        if cache:
            keys = {name: torch.cat([cache[name], new], dim=1) for name, new in keys.items()}
        visible_BTS = visibility(positions_BT, documents_BS, keys["positions"], keys["documents"], window)
        if gate_BS is None:
            bias_BTS = as_bias(visible_BTS, q_BTHK.dtype)
        else:
            distance_BTS = positions_BT[:, :, None] - keys["positions"][:, None]
            bias_BTS = as_gated_bias(visible_BTS, distance_BTS, keys[KEY_GATE], q_BTHK.dtype)
        v_BSJV = heads.get(ALL_VALUES, keys.get("v", v_BSJV))
        return read.masked(q_BTHK, keys["k"], v_BSJV, bias_BTS), None if cache is None else keys

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        out = out_BTHV.flatten(-2)
        if "gate" in kept:
            out = out * kept["gate"].sigmoid()
        return self.o(out)
