"""Attention among tokens that a random hash puts together (Kitaev et al., "Reformer", arXiv 2001.04451).

Shape suffixes: B batch, T queries, S keys, D model width, H heads, R rounds of hashing, K key and V value width of a
head, G = buckets / 2 random directions of a round.
"""

import dataclasses
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.context import LayerContext
from models.kernels.buckets import Places, attend_dense, attend_sorted, places
from models.limits import at_least, head_width
from models.noise import normal_sequences
from models.params import Axis, Linear, upcast
from models.rope import angles, rotate_half
from models.slots import Cache, Mixer, MixerConfig
from models.state import ALL_VALUES, KEY_GATE, Projected, Side, State, Views


@dataclasses.dataclass(frozen=True)
class LSHConfig(MixerConfig, kind="lsh"):
    """Attention among tokens that a random hash puts together (Reformer).

    Queries are keys too, of length 1 as keys. A token is hashed `rounds` times to the nearest of `buckets` random
    directions, and sees the last `window` tokens of its buckets; itself only where it sees no other. Training draws
    directions anew at every step for each sequence, evaluation has fixed ones. rope: whether what is compared, but not
    what is hashed, is rotated by its position. head_dim: default d_model / num_heads.

    Reformer sees chunks of the sorted tokens, whose edges later tokens move; a window within the bucket does not know
    of them.
    """

    num_heads: int
    head_dim: int | None = None
    buckets: int = 64
    rounds: int = 2
    window: int = 64
    rope: Literal["half", "none"] = "half"
    rope_theta: float = 10000.0

    key_gate = True
    example = MappingProxyType({"num_heads": 4, "head_dim": 4, "buckets": 4, "rounds": 2, "window": 3})

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "head_dim", "rounds", "window", "rope_theta")
        at_least(self, 2, "buckets")
        if self.buckets % 2:
            raise ValueError(f"buckets is {self.buckets}; they are directions and their opposites, make it even")

    def build(self, ctx: LayerContext) -> Mixer:
        head_dim = head_width(ctx.d_model, self.num_heads, self.head_dim)
        if self.rope != "none" and head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}, and rope turns pairs; make it even, or use rope none")
        return LSH(self, ctx, head_dim)

    def value_shape(self, d_model: int) -> tuple[int, int]:
        return self.num_heads, self.head_dim or d_model // self.num_heads

    def flops_per_token(self, d_model: int, sequence: int) -> float:
        head_dim = self.head_dim or d_model // self.num_heads
        seen = min(2 * self.window, sequence)
        return self.num_heads * self.rounds * head_dim * (4 * seen + self.buckets)


class LSH(Mixer):
    views = ("q", "v")

    def __init__(self, config: LSHConfig, ctx: LayerContext, head_dim: int) -> None:
        super().__init__()
        self.config, self.head_dim = config, head_dim
        width, axis = config.num_heads * head_dim, Axis("heads", config.num_heads)
        self.qk = Linear(ctx.d_model, width, axis=axis)
        self.v = Linear(ctx.d_model, width, axis=axis)
        self.o = Linear(width, ctx.d_model, in_axis=axis, init=ctx.output_init)

    def project(self, views: Views, inputs: State, side: Side) -> Projected:
        q = self.qk(views.q_BTD).unflatten(-1, (-1, self.head_dim))
        v = self.v(views.v_BTD).unflatten(-1, (-1, self.head_dim))
        return Projected({"q": q, "v": v}, {})

    @torch.no_grad()
    def codes(self, q_BTHK: Tensor, side: Side) -> Tensor:
        """The nearest direction of each round, [B, T, H, R]; the hash of equation 3 with random rotations."""
        config = self.config
        if not side.draws:
            side = side.with_keys(torch.zeros_like(side.tokens[:, 0]))
        directions = normal_sequences(side, "lsh", self.head_dim * config.rounds * (config.buckets // 2))
        directions_BKRG = directions.view(-1, self.head_dim, config.rounds, config.buckets // 2)
        near_BTHRG = torch.einsum("bthk,bkrg->bthrg", upcast(q_BTHK), directions_BKRG.to(upcast(q_BTHK).dtype))
        return torch.cat([near_BTHRG, -near_BTHRG], dim=-1).argmax(-1)

    def core(
        self, heads: dict[str, Tensor], weights: dict[str, Tensor], side: Side, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        q_BTHK, v_BTHV, config = heads["q"], heads["v"], self.config
        codes_BTHR = side.choose(self, lambda: self.codes(q_BTHK, side))
        if config.rope != "none":
            dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
            cos, sin = angles(side.positions_BT, self.head_dim, config.rope_theta, dtype)
            q_BTHK = rotate_half(q_BTHK, cos, sin)
        k_BTHK = F.normalize(q_BTHK, dim=-1)
        documents_BT = side.documents_BT if side.documents is not None else torch.zeros_like(side.positions_BT)
        assert documents_BT is not None
        bias_BT = heads[KEY_GATE].clamp(1e-6, 1).log().to(q_BTHK.dtype) if KEY_GATE in heads else None
        if cache is None:
            own, order_BTHR = places(codes_BTHR, documents_BT, config.buckets)
            return attend_sorted(q_BTHK, k_BTHK, v_BTHV, own, order_BTHR, bias_BT, config.window), None
        keys: Cache = {"k": k_BTHK, "codes": codes_BTHR, "documents": documents_BT}
        if ALL_VALUES not in heads:
            keys["v"] = v_BTHV
        if bias_BT is not None:
            keys["bias"] = bias_BT
        keys = {name: torch.cat([cache[name], new], dim=1) if cache else new for name, new in keys.items()}
        everyone, _ = places(keys["codes"], keys["documents"], config.buckets)
        queries = Places(*(x[:, -q_BTHK.shape[1] :] for x in everyone))
        v_BSHV = heads.get(ALL_VALUES, keys.get("v", v_BTHV))
        return attend_dense(q_BTHK, keys["k"], v_BSHV, queries, everyone, keys.get("bias"), config.window), keys

    def merge(self, out_BTHV: Tensor, kept: dict[str, Tensor]) -> Tensor:
        return self.o(out_BTHV.flatten(-2))
