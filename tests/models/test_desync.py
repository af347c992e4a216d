"""The desync residual against its recurrence, written out with each rank's weights by hand."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from models.mixers.attention import AttentionConfig
from models.residual.desync import Desync, DesyncResidual
from models.state import Side, Views
from parallel.mesh import MeshConfig
from parallel.preflight import refuse
from tests.connections import context
from tests.contract.tiny import build as tiny
from tests.contract.tiny import plain
from tests.models.residuals import build, perturb, tokens


def rows(x: Tensor, rank: int, ranks: int, dim: int = 0) -> Tensor:
    return x.chunk(ranks, dim)[rank]


def attend(u: Tensor, weights: Mapping[str, Tensor], rank: int, ranks: int) -> Tensor:
    """A rank's part of attention with 4 heads of width 2: an attention with its heads alone."""
    own = AttentionConfig(num_heads=4 // ranks, head_dim=2).build(context(8, 0, 1)).double()
    mine = {f"{name}.weight": rows(weights[f"mixer.branch.mixer.{name}.weight"], rank, ranks) for name in "qkv"}
    mine["o.weight"] = rows(weights["mixer.branch.mixer.o.weight"], rank, ranks, dim=1)
    own.load_state_dict(mine)
    side = Side(tokens(), torch.arange(6).expand(2, 6))
    heads, kept, _ = own.project(Views.same(u), {}, side)
    return own.merge(own.core(heads, own.core_weights(), side, None)[0], kept)


def feed(u: Tensor, weights: Mapping[str, Tensor], rank: int, ranks: int) -> Tensor:
    gate, up = (rows(weights[f"ffn.branch.ffn.{name}.weight"], rank, ranks) for name in ("gate", "up"))
    down = rows(weights["ffn.branch.ffn.down.weight"], rank, ranks, dim=1)
    return (torch.nn.functional.silu(u @ gate.T) * (u @ up.T)) @ down.T


@torch.no_grad()
@pytest.mark.parametrize(("ranks", "every"), [(2, 2), (4, 2), (2, 4), (2, 5), (2, 1)])
def test_ranks_keep_streams_of_their_own_between_reductions(ranks: int, every: int) -> None:
    model = build(DesyncResidual(ranks, every))
    perturb(model)
    assert model.embed is not None and model.head is not None and model.norm is not None
    streams = [model.embed(tokens())] * ranks
    for index, layer in enumerate(model.blocks):
        weights = dict(layer.named_parameters())
        for number, (sublayer, part) in enumerate(((layer.mixer, attend), (layer.ffn, feed)), start=1):
            normed = [sublayer.placement.before(Views.same(x)).q_BTD for x in streams]
            outs = [part(u, weights, rank, ranks) for rank, u in enumerate(normed)]
            if (2 * index + number) % every == 0 or 2 * index + number == 6:
                streams = [torch.stack(streams).mean(0) + torch.stack(outs).sum(0)] * ranks
            else:
                streams = [x + out for x, out in zip(streams, outs, strict=True)]
    expected = model.head.logits(model.norm(streams[0]))
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-12, atol=1e-12)


def test_only_a_reduction_each_second_sublayer() -> None:
    connections = [s.connection for layer in build(DesyncResidual(2)).blocks for s in (layer.mixer, layer.ffn)]
    assert [isinstance(c, Desync) and c.reduces for c in connections] == [False, True] * 3


DESYNC: dict[str, Any] = {"residual": {"kind": "desync", "ranks": 4}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DesyncResidual(ranks=1), "ranks is 1; it must be at least 2; one rank is residual plain"),
        (lambda: DesyncResidual(ranks=2, every=0), "every is 0"),
        (lambda: build(DesyncResidual(ranks=3)), "needs that number to divide the 4 heads of"),
        (
            lambda: refuse(tiny(**DESYNC), MeshConfig(tp=3)),
            "for 4 tensor ranks, and tp=3 does not divide that; use tp=2",
        ),
        (lambda: refuse(tiny(**DESYNC), MeshConfig(tp=8)), "tp=8 does not divide that; use tp=4"),
        (lambda: refuse(tiny(ffn="moe", **DESYNC), MeshConfig()), "MoE works on whole tokens, and"),
        (lambda: refuse(tiny(mixer="hgrn2", **DESYNC), MeshConfig()), "HGRN2 needs a number from all heads"),
        (
            lambda: refuse(
                tiny(mixer={**plain("mixer", "attention"), "num_kv_heads": 2}, values="resformer", **DESYNC),
                MeshConfig(),
            ),
            "has 2 heads, and a residual that gives each of 4 tensor ranks a stream",
        ),
    ],
)
def test_what_has_no_part_for_each_rank_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
