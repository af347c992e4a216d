"""What recurrent mixers have in common: short convolutions, documents, decoding; and the parts of matrix recurrences.

Shape suffixes: B batch, T sequence, S = T and the tokens before it that the convolutions see, H heads, K and V widths.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from models.conv import FanInUniform, prepend, short_conv, tail
from models.kernels.linear.choice import Recurrence, SlotRecurrence
from models.kernels.linear.chunked import chunk_length
from models.limits import at_least, shared_out
from models.params import Axis, declare, upcast
from models.recurrences import Recurrences, Rule, SpreadRecurrences
from models.sequence_group import SequenceGroup
from models.slots import Cache, Mixer, MixerConfig
from models.state import KEY_GATE, Side

L2_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """log A with A uniform in (low, high]."""

    low: float
    high: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        share = 1 - torch.rand(shape, generator=generator)
        return (self.low + (self.high - self.low) * share).log()


@dataclasses.dataclass(frozen=True)
class TimeStepBias:
    """The b for which softplus(b) is log-uniform in [0.001, 0.1] (Mamba, arXiv 2312.00752)."""

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        low, high = math.log(1e-3), math.log(1e-1)
        step = (low + (high - low) * torch.rand(shape, generator=generator)).exp()
        return step + (-torch.expm1(-step)).log()


@dataclasses.dataclass(frozen=True)
class SharedHeadsConfig(MixerConfig):
    """Heads of a recurrence whose keys and values may have fewer heads, each serving several query heads.

    expand_k, expand_v: width of all query heads and of all value heads together, as multiples of d_model.
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "num_kv_heads")
        shared_out(self.num_heads, self.num_kv_heads)

    def canonical(self, d_model: int) -> Self:
        return dataclasses.replace(self, num_kv_heads=self.num_kv_heads or self.num_heads)

    def key_width(self, d_model: int) -> int:
        return whole("a key head", d_model * self.expand_k / self.num_heads, "d_model, num_heads or expand_k")

    def value_shape(self, d_model: int) -> tuple[int, int]:
        width = whole("a value head", d_model * self.expand_v / self.num_heads, "d_model, num_heads or expand_v")
        return self.num_kv_heads or self.num_heads, width


class LinearMixer(Mixer):
    """A subclass defines `mix`, and calls `declare_convs` if it has convolutions. One with a recurrence of matrices
    holds it as `recurrence`; one whose value channels decay, as `slot_recurrence`.

    conv_size: tokens that a convolution sees. states: the cache's entries that start anew with a document.
    """

    in_place = True
    conv_size = 0
    convolved: tuple[str, ...] = ()
    states: tuple[str, ...] = ("state",)

    def __init__(self) -> None:
        super().__init__()
        self.recurrence: Recurrence | None = None
        self.slot_recurrence: SlotRecurrence | None = None

    def declare_convs(self, widths: Mapping[str, tuple[Axis, int]], size: int, bias: bool = False) -> None:
        """A convolution over each of these heads, by their axis and width."""
        self.conv_size, self.convolved, self._weights = size, tuple(widths), []
        for name, (axis, width) in widths.items():
            self._weights.append(f"conv_{name}")
            declare(self, f"conv_{name}", (axis.groups, width, size), FanInUniform(size), (axis, None, None))
            if bias:
                self._weights.append(f"conv_{name}_bias")
                shape = (axis.groups, width)
                declare(self, f"conv_{name}_bias", shape, FanInUniform(size), (axis, None), decay=False)

    def core_weights(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._weights} if self.conv_size else {}

    def mix(
        self, x: dict[str, Tensor], weights: dict[str, Tensor], past: Cache, rule: Recurrences, positions_BT: Tensor
    ) -> tuple[Tensor, Cache]:
        """Heads after their convolutions, and the states before them, to ([B, T, H, V], the states after them)."""
        raise NotImplementedError

    def activate(self, x_BTHK: Tensor) -> Tensor:
        """What follows a convolution."""
        return F.silu(x_BTHK)

    def core(
        self, heads: dict[str, Tensor], weights: dict[str, Tensor], side: Side, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        if self.sequence is not None:
            return self.core_in_place(heads, weights, side, self.sequence), None
        documents_BT, past = side.documents_BT, cache or {}
        if documents_BT is None and cache is not None:
            documents_BT = torch.zeros_like(side.positions_BT)
        # The document of one token before is needed at least, to know whether the state goes on.
        width = max(self.conv_size, 2)
        documents_BS = real_B = None
        if documents_BT is not None:
            documents_BS = prepend(documents_BT, past.get("documents"), width, fill=-1)
            real_B = (documents_BT >= 0).sum(1)
        seen = {name: prepend(heads[name], past.get(f"conv_{name}"), self.conv_size) for name in self.convolved}
        x = {**heads, **self.convolve(seen, weights, documents_BS)}
        before: Cache = {}
        before_B1 = None if documents_BS is None else documents_BS[:, width - 2 : width - 1]
        if past and documents_BT is not None and before_B1 is not None:
            goes_on_B = (documents_BT[:, 0] == before_B1[:, 0]) | (documents_BT[:, 0] < 0)
            for name in self.states:
                before[name] = past[name] * goes_on_B.view(-1, *(1,) * (past[name].dim() - 1))
        rule = Recurrences(documents_BT, before_B1, self.recurrence, self.slot_recurrence)
        out_BTHV, after = self.mix(x, weights, before, rule, side.positions_BT)
        if cache is None or documents_BS is None or real_B is None:
            return out_BTHV, None
        new = {f"conv_{name}": tail(x_BS, real_B, self.conv_size) for name, x_BS in seen.items()}
        return out_BTHV, {**new, **after, "documents": tail(documents_BS, real_B, width)}

    def convolve(
        self, seen: dict[str, Tensor], weights: dict[str, Tensor], documents_BS: Tensor | None
    ) -> dict[str, Tensor]:
        """seen: heads [B, S, H, K] with the conv_size - 1 tokens before them. documents_BS: likewise, if not longer."""
        out = {}
        for name, x_BSHK in seen.items():
            documents = None if documents_BS is None else documents_BS[:, -x_BSHK.shape[1] :]
            conv = short_conv(x_BSHK, weights[f"conv_{name}"], weights.get(f"conv_{name}_bias"), documents)
            out[name] = self.activate(conv)
        return out

    def core_in_place(
        self, heads: dict[str, Tensor], weights: dict[str, Tensor], side: Side, group: SequenceGroup
    ) -> Tensor:
        """Where ranks have stretches of the sequence: each fetches the tokens in front of its own for the convolutions,
        and the states there."""
        x = {name: group.rows(head) for name, head in heads.items()}
        documents_RC = documents_RS = before_R1 = None
        if side.documents_BT is not None:
            documents_RC = group.rows(side.documents_BT)
            documents_RS = torch.cat([group.before(documents_RC, max(self.conv_size - 1, 1), -1), documents_RC], 1)
            before_R1 = documents_RS[:, -documents_RC.shape[1] - 1, None]
        seen = {name: torch.cat([group.before(x[name], self.conv_size - 1), x[name]], 1) for name in self.convolved}
        x |= self.convolve(seen, weights, documents_RS)
        rule = SpreadRecurrences(documents_RC, before_R1, group, self.recurrence, self.slot_recurrence)
        return group.joined(self.mix(x, weights, {}, rule, group.rows(side.positions_BT))[0])


def whole(name: str, width: float, hint: str) -> int:
    """A width that a config gives as a factor. Raises ValueError unless it is whole and positive."""
    if width != int(width) or width < 1:
        raise ValueError(f"{name} would be {width:g} wide; it must be whole and at least 1, so change {hint}")
    return int(width)


def refuse_ungrouped(num_heads: int, num_value_heads: int | None) -> None:
    """Raise ValueError unless key heads can share out the value heads."""
    if (num_value_heads or num_heads) % num_heads:
        raise ValueError(
            f"num_value_heads {num_value_heads} is not a multiple of num_heads {num_heads}; "
            "every key head serves the same number of value heads, so change one of them"
        )


def key_gated(x_BTH: Tensor, heads: dict[str, Tensor]) -> Tensor:
    """Times the gate of each token's key, where there is one: a skipped token writes nothing."""
    if KEY_GATE not in heads:
        return x_BTH
    gate_BT = heads[KEY_GATE].to(x_BTH.dtype)
    return x_BTH * gate_BT.reshape(*gate_BT.shape, *(1,) * (x_BTH.dim() - 2))


def unit(x_BTHK: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension, at least in float32: the delta rule needs keys of length 1."""
    x = upcast(x_BTHK)
    return x * (x.square().sum(-1, keepdim=True) + L2_EPS).rsqrt()


def normalized(
    rule: Rule, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, x: dict[str, Tensor], past: Cache, eps: float
) -> tuple[Tensor, Cache]:
    """Plain writes; the output is divided by eps plus the sum of its weights, which one more column of values adds up.

    Weights must not be negative. x: the heads, which may hold the gates of keys.
    """
    v = upcast(v_BTHV)
    v = key_gated(torch.cat([v, torch.ones_like(v[..., :1])], -1), x)
    out, state = rule(q_BTHK, k_BTHK, v, scale=1.0, state_BJKV=past.get("state"))
    return (out[..., :-1] / (out[..., -1:] + eps)).to(v_BTHV.dtype), {"state": state}


def rule_flops(
    key: int,
    value: int,
    key_heads: int,
    value_heads: int,
    sequence: int,
    *,
    delta: bool = False,
    per_channel: bool = False,
) -> float:
    """Of the chunk form, per token, forward. Per value head: what is written into the outputs of its chunk, the state's
    update and read, and for the delta rule the solution. Products of keys with queries, and for the delta rule with
    keys, per key head; with a decay per channel they are products of three, per value head."""
    chunk = chunk_length(per_channel, sequence)
    pairs = 3 * chunk * key * value_heads if per_channel else 2 * chunk * key * key_heads
    written = (2 * chunk * value + 4 * key * value) * value_heads
    if not delta:
        return pairs + written
    return 2 * pairs + written + (2 * chunk * (key + value) + 2 * key * value) * value_heads
