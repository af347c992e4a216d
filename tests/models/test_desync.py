"""The desync residual against its recurrence, written out with each rank's weights by hand."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from models.lm import LM
from models.mixers.attention import AttentionConfig
from models.residual.desync import Desync, DesyncResidual
from models.state import Side, Views
from parallel.mesh import MeshConfig
from parallel.preflight import refuse
from tests.connections import context
from tests.contract.test_contract import KEYS, shaken
from tests.contract.test_contract import tokens as batch
from tests.contract.tiny import build as tiny
from tests.contract.tiny import every_kind, of_matrices, plain
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
WIDE = {"kind": "attention", "num_heads": 16, "head_dim": 2}
SIX = {"kind": "attention", "num_heads": 6, "head_dim": 2}
EXPERTS = {**plain("ffn", "moe"), "shared_gate": True, "capacity_factor": 0.9}
NOISY = {**plain("ffn", "moe"), "router": plain("router", "noisy_top_k")}


def assert_as_plain(**fields: Any) -> None:
    """With a reduction after every sublayer all streams are equal, and the model computes what the plain one does."""
    residual = {"kind": "desync", "ranks": 2, "every": 1}
    models = [shaken(tiny(**fields, residual=residual)), shaken(tiny(**fields))]
    models[1].load_state_dict(models[0].state_dict())
    mine, plain_one = (model(batch(), batch(), keys_B=KEYS) for model in models)
    torch.testing.assert_close(mine.loss, plain_one.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(dict(mine.losses), dict(plain_one.losses), rtol=1e-12, atol=1e-15)
    found, expected = (
        torch.autograd.grad(out.loss, list(model.parameters()))
        for out, model in zip((mine, plain_one), models, strict=True)
    )
    limit = 1e-12 * max(float(x.abs().max()) for x in expected)
    for (name, _), a, b in zip(models[0].named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize(
    "fields",
    [
        {"ffn": EXPERTS, "mixer": "mla"},
        {"ffn": "moe_plus_plus", "mixer": "moa"},
        {"ffn": NOISY, "mixer": {**plain("mixer", "gated_attention"), "gate": {"kind": "slice"}}},
        {"ffn": "moe_plus_plus_released", "depth": {"kind": "universal_act", "scale": 0.1, "bias": -1.0}},
    ],
    ids=("moe_mla", "moe_plus_plus_moa", "noisy_slices", "universal_act"),
)
def test_in_step_it_is_the_plain_model(fields: dict[str, Any]) -> None:
    assert_as_plain(**fields)


@pytest.mark.slow
@pytest.mark.parametrize(("slot", "kind"), [at for at in every_kind() if at[0] not in ("residual", "scaling", "norm")])
def test_in_step_every_kind_is_the_plain_model(slot: str, kind: str) -> None:
    """But for norms behind a branch, which norm each rank's part."""
    fields: dict[str, Any] = {slot: kind}
    if slot == "router":
        fields = {"ffn": {**plain("ffn", "moe"), slot: plain(slot, kind)}}
    if slot == "matrix":
        fields = {"ffn": of_matrices(kind)}
    try:
        LM(tiny(**fields, residual={"kind": "desync", "ranks": 2}))
    except ValueError as error:
        pytest.skip(str(error))
    assert_as_plain(**fields)


def test_each_rank_picks_experts_of_its_own() -> None:
    """And runs its columns of them: the recurrence by hand, a rank with a model of its own columns."""
    ffn = {"kind": "moe", "num_experts": 3, "hidden": 8, "router": {"kind": "mixtral", "aux_coef": 0.1}}
    model = shaken(tiny(2, ffn=ffn, residual={"kind": "desync", "ranks": 2, "every": 4}))
    layer = model.blocks[1].ffn
    weights = dict(layer.branch.ffn.named_parameters())
    side = Side(batch(), torch.arange(batch().shape[1]).expand(batch().shape))
    streams = torch.randn(*batch().shape, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert layer.by_rank is not None
    result = layer.branch.forward_by_rank(layer.by_rank, Views.same(streams), {}, side, side, None)
    outs, losses, picks = [], [], []
    for rank in range(2):
        own = tiny(ffn={**ffn, "hidden": 4}).expanded[0].ffn.build(context(16, 0, 1)).double()
        columns = slice(4 * rank, 4 * rank + 4)
        own.load_state_dict(
            {
                "router.weight": weights["router.weight"],
                "experts.gate": weights["experts.gate"][..., columns],
                "experts.up": weights["experts.up"][..., columns],
                "experts.down": weights["experts.down"][:, columns],
            }
        )
        alone = own(streams[:, :, rank], {}, side)
        outs.append(alone.out_BTD)
        losses.append(alone.losses["load_balance"])
        picks.append((streams[:, :, rank] @ weights["router.weight"].T).topk(2).indices)
    assert (picks[0] != picks[1]).any(), "the streams route apart"
    torch.testing.assert_close(result.out_BTD, torch.stack(outs, -2), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(result.losses["load_balance"], torch.stack(losses).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DesyncResidual(ranks=1), "ranks is 1; it must be at least 2 for streams to differ"),
        (lambda: DesyncResidual(ranks=2, every=0), "every is 0"),
        (lambda: build(DesyncResidual(ranks=3)), "needs that number to divide the 4 heads of attention;"),
        (
            lambda: refuse(tiny(**DESYNC), MeshConfig(tp=3)),
            "for 4 tensor ranks, and tp=3 does not divide that; use tp=2",
        ),
        (lambda: refuse(tiny(**DESYNC), MeshConfig(tp=8)), "tp=8 does not divide that; use tp=4"),
        (
            lambda: refuse(tiny(mixer="moa", residual={"kind": "desync", "ranks": 3}, ffn="none"), MeshConfig()),
            "to divide the 8 heads of moa",
        ),
        (
            lambda: refuse(tiny(ffn="moe", residual={"kind": "desync", "ranks": 16}, mixer=WIDE), MeshConfig()),
            "to divide the 8 expert_ffn of moe",
        ),
        (
            lambda: refuse(tiny(mixer=SIX, ffn="none", residual={"kind": "desync", "ranks": 3}), MeshConfig(cp=2)),
            "makes 3 streams on each of tp=1 tensor ranks, and cp=2 neither divides that",
        ),
        (lambda: refuse(tiny(mixer="hgrn2", **DESYNC), MeshConfig()), "hgrn2 needs a number from all heads"),
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
