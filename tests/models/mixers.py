"""A mixer alone: its inputs, and a call of its parts as the layer makes them.

Shape suffixes: B batch, T sequence, D model width, H heads, V value width of a head.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from models.slots import Cache, Mixer
from models.state import KEY_GATE, Side, Views

WIDTH = 12


def stream(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def side_of(batch: int, length: int, start: int = 0, documents_BT: Tensor | None = None) -> Side:
    positions_BT = torch.arange(start, start + length).expand(batch, length)
    return Side(torch.zeros_like(positions_BT), positions_BT, documents_BT)


def run(
    mixer: Mixer,
    x_BTD: Tensor,
    side: Side,
    cache: Cache | None = None,
    gate_BT: Tensor | None = None,
    extra: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[Tensor, Cache | None]:
    """extra: further weights of the core."""
    views = Views.same(x_BTD)
    own = mixer.own_tokens(views, {}, side)
    heads, kept, _ = mixer.project(views, {**own.made, **own.made_by_head}, side)
    if gate_BT is not None:
        heads[KEY_GATE] = gate_BT
    out_BTHV, cache = mixer.core(heads, {**mixer.core_weights(), **extra}, side, cache)
    return mixer.finish(mixer.merge(out_BTHV, kept)), cache
