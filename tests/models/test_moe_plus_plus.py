"""MoE++ against a loop over tokens, its gating residual, and what it does not compute."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import LayerConfig, LMConfig
from models.ffn.moe_plus_plus import LOGITS, MoEPlusPlus, MoEPlusPlusConfig
from models.ffn.moe_plus_plus_released import MoEPlusPlusReleasedConfig
from models.ffn.swiglu import SwiGLUConfig
from models.kernels.grouped_mm import grouped_mm
from models.lm import LM
from models.mixers.attention import AttentionConfig
from models.params import initialize
from models.slots import FFNConfig
from models.state import Side, State

AUX: dict[str, Any] = {"aux_coef": 0.3, "tau": 0.6}
SIZES = {
    "plain": ((2, 5, 6), MoEPlusPlusConfig(5, 7, **AUX)),
    "one token": ((1, 1, 4), MoEPlusPlusConfig(2, 3, **AUX)),
    "top 1": ((2, 6, 4), MoEPlusPlusConfig(2, 3, top_k=1, num_zero=2, **AUX)),
    "all experts": ((2, 3, 5), MoEPlusPlusConfig(2, 3, top_k=6, **AUX)),
    "no constants": ((2, 3, 5), MoEPlusPlusConfig(3, 4, num_constant=0, num_copy=2, **AUX)),
    "FFN experts only": ((2, 3, 5), MoEPlusPlusConfig(3, 4, num_constant=0, num_copy=0, num_zero=0, **AUX)),
    "more zero experts than picks": ((2, 4, 5), MoEPlusPlusConfig(1, 4, num_constant=1, num_copy=0, num_zero=6, **AUX)),
}


def attention() -> AttentionConfig:
    return AttentionConfig(1, rope="none")


def chain(config: FFNConfig, d_model: int, dtype: torch.dtype = torch.float64) -> list[MoEPlusPlus]:
    """Two layers with a third behind them, so that both pass on their logits."""
    model = LMConfig(2, d_model, {"M": LayerConfig(attention(), config)}, "MMM")
    generator, modules = torch.Generator().manual_seed(1), []
    for layer in range(2):
        module = config.build(model.context(layer))
        assert isinstance(module, MoEPlusPlus)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
        modules.append(module.to(dtype))
    return modules


def side_of(shape: tuple[int, ...]) -> Side:
    """The last token of row 0 is padding, where a row has more than one."""
    ids = torch.zeros(shape[:2], dtype=torch.int64)
    documents = ids.clone()
    documents[0, max(shape[1] - 1, 1) :] = -1
    return Side(ids, ids, documents)


def inputs(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def expert(module: MoEPlusPlus, e: int, x_D: Tensor) -> Tensor:
    ffn, constant, copy, _ = module.config.sizes
    if e < ffn:
        a = x_D @ module.experts.gate[e]
        return (a / (1 + torch.exp(-a)) * (x_D @ module.experts.up[e])) @ module.experts.down[e]
    if e < ffn + constant:
        assert module.constants is not None
        first, second = torch.exp(module.constants.weight[e - ffn] @ x_D)
        return (first * x_D + second * module.constants.value[e - ffn]) / (first + second)
    return x_D if e < ffn + constant + copy else torch.zeros_like(x_D)


def oracle(
    module: MoEPlusPlus,
    x_BTD: Tensor,
    before_BTE: Tensor | None,
    valid: list[list[bool]],
    dropped: Collection[tuple[int, int, int]] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, logits, loss, load) one token and one expert at a time. dropped: (row, token, expert) without room."""
    config, count = module.config, module.config.num_total
    where = [(b, t) for b in range(x_BTD.shape[0]) for t in range(x_BTD.shape[1])]
    out, logits, probs, picks = {}, {}, {}, {}
    for at in where:
        logits[at] = module.router.get_parameter("weight") @ x_BTD[at]
        if before_BTE is not None:
            assert module.router_residual is not None
            logits[at] = logits[at] + module.router_residual.weight @ before_BTE[at]
        probs[at] = torch.exp(logits[at]) / torch.exp(logits[at]).sum()
        picks[at] = sorted(range(count), key=lambda e: -probs[at][e].item())[: config.top_k]
        counted = [e for e in picks[at] if e < count - config.num_zero]
        total = sum(probs[at][e] for e in counted)
        terms = [probs[at][e] / total * expert(module, e, x_BTD[at]) for e in counted if (*at, e) not in dropped]
        out[at] = sum(terms, torch.zeros_like(x_BTD[at]))
    valid_at = [(b, t) for b, t in where if valid[b][t]]
    rows = [[at for at in valid_at if at[0] == b] for b in range(x_BTD.shape[0])]
    loss = x_BTD.new_zeros(())
    for group in [valid_at] if config.stats_group == "microbatch" else rows:
        for e in range(count):
            f = sum(e in picks[at] for at in group) / len(group)
            eta = 1 if e < config.num_experts else config.tau
            loss = loss + config.aux_coef * len(group) * eta * f * sum(probs[at][e] for at in group) / len(group)
    load = torch.tensor([sum(e in picks[at] for at in valid_at) for e in range(count)])
    stacked = [torch.stack([part[at] for at in where]).unflatten(0, x_BTD.shape[:2]) for part in (out, logits)]
    return stacked[0], stacked[1], loss, load


@pytest.mark.parametrize("group", ["sequence", "microbatch"])
@pytest.mark.parametrize("case", SIZES)
def test_two_layers_equal_a_loop_over_tokens(case: str, group: str) -> None:
    shape, config = SIZES[case]
    modules, x, side = chain(dataclasses.replace(config, stats_group=group), shape[2]), inputs(shape), side_of(shape)
    leaves = [x, *(parameter for module in modules for parameter in module.parameters())]
    got, expected = x.new_zeros(()), x.new_zeros(())
    x_ours, x_theirs, state, logits = x, x, State(), None
    for layer, module in enumerate(modules):
        result = module(x_ours, state, side)
        out, logits, loss, load = oracle(module, x_theirs, logits, side.valid_BT.tolist())
        torch.testing.assert_close(result.out_BTD, out, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(result.writes[LOGITS], logits, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(result.losses["load_balance"], loss, rtol=1e-11, atol=1e-11)
        assert torch.equal(result.stats["expert_load"], load)
        cotangent = inputs(shape, seed=2 + layer).detach()
        got = got + (result.out_BTD * cotangent).sum() + result.losses["load_balance"]
        expected = expected + (out * cotangent).sum() + loss
        x_ours, x_theirs, state = x_ours + result.out_BTD, x_theirs + out, result.writes
    gradients = (torch.autograd.grad(total, leaves, allow_unused=True) for total in (got, expected))
    for value, reference, leaf in zip(*gradients, leaves, strict=True):
        value, reference = (torch.zeros_like(leaf) if g is None else g for g in (value, reference))
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)


def test_the_residual_carries_gradient_to_the_earlier_router() -> None:
    shape, config = SIZES["plain"]
    (first, second), x, side = chain(config, shape[2]), inputs(shape), side_of(shape)
    logits = first(x, {}, side).writes
    out = second(x.detach(), logits, side).out_BTD
    (gradient,) = torch.autograd.grad(out.square().sum(), first.router.get_parameter("weight"))
    assert gradient.abs().max() > 1e-3


def layers(**configs: FFNConfig) -> dict[str, LayerConfig]:
    return {letter: LayerConfig(attention(), config) for letter, config in configs.items()}


def test_logits_cross_other_layers_and_are_dropped_after_their_last_reader() -> None:
    config = layers(M=MoEPlusPlusConfig(2, 3), D=SwiGLUConfig(4))
    model = LM(LMConfig(8, 4, config, "DMDMD")).bfloat16()
    initialize(model, seed=0)
    entries = [{entry.name: entry for entry in boundary} for boundary in model.boundaries]
    assert [LOGITS in boundary for boundary in entries] == [False, False, True, True, False, False]
    assert entries[2][LOGITS].shape == (6,) and entries[2][LOGITS].dtype_in(torch.bfloat16) == torch.float32
    assert entries[2]["losses"].dtype_in(torch.bfloat16) == torch.float32
    assert entries[2][LOGITS].dtype_in(torch.float64) == torch.float64
    tokens = torch.arange(6)[None]
    out = model(tokens, tokens)
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_routers_of_another_size_do_not_see_each_other() -> None:
    config = layers(M=MoEPlusPlusConfig(2, 3), N=MoEPlusPlusConfig(3, 3))
    model = LM(LMConfig(8, 4, config, "MNMM"))
    ffns = [module for module in model.modules() if isinstance(module, MoEPlusPlus)]
    assert [ffn.reads for ffn in ffns] == [(), (), (), (LOGITS,)]
    assert [bool(ffn.writes) for ffn in ffns] == [False, False, True, False]


@pytest.mark.parametrize("capacity", [None, 1.1, 0.6])
def test_only_picks_of_ffn_experts_are_permuted_and_multiplied(capacity: float | None) -> None:
    shape, config = SIZES["plain"]
    module, x = chain(dataclasses.replace(config, capacity_factor=capacity), shape[2])[0], inputs(shape)
    side = side_of(shape).with_keys(torch.arange(shape[0]))
    permuted, multiplied = [], []
    permute = module.dispatch.permute.call

    def counted(x_ND: Tensor, places_NK: Tensor, rows: int) -> Tensor:
        permuted.append(rows)
        return permute(x_ND, places_NK, rows)

    def product(a_MK: Tensor, b_EKN: Tensor, counts_E: Tensor) -> Tensor:
        multiplied.append(counts_E.tolist())
        assert sum(multiplied[-1]) == len(a_MK)
        return grouped_mm(a_MK, b_EKN, counts_E)

    module.dispatch.permute.call = counted
    module.experts.grouped_mm.call = product
    module(x, {}, side)
    index = module.select(module.router(x), side).index_BTK
    late = without_room(config, index.tolist(), side.valid_BT.tolist(), capacity) if capacity else set()
    padding = capacity is not None  # where room is limited, padding takes none
    wanted = [
        e
        for b, row in enumerate(index.tolist())
        for t, picks in enumerate(row)
        for e in picks
        if e < config.num_experts and (b, t, e) not in late and (side.valid_BT[b, t] or not padding)
    ]
    assert permuted == [len(wanted)] and 0 < len(wanted) < index.numel()
    assert multiplied == [[wanted.count(e) for e in range(config.num_experts)]] * 3


def without_room(
    config: MoEPlusPlusConfig, index: list[list[list[int]]], valid: list[list[bool]], capacity: float
) -> set[tuple[int, int, int]]:
    """(row, token, expert) of the picks that come too late."""
    ffn, free, tau = config.num_experts, config.num_total - config.num_experts, config.tau
    where = [(b, t, e) for b, row in enumerate(index) for t, picks in enumerate(row) if valid[b][t] for e in picks]
    rows = [[at for at in where if at[0] == b] for b in range(len(index))]
    late = set()
    for group in [where] if config.capacity_group == "microbatch" else rows:
        share = capacity * len(group) / (tau * ffn + free)
        left = [max(1, math.floor(share * (tau if e < ffn else 1))) for e in range(ffn + free)]
        for at in group:
            late |= set() if left[at[2]] > 0 else {at}
            left[at[2]] -= 1
    return late


@pytest.mark.parametrize("group", ["sequence", "microbatch"])
def test_room_equals_a_queue_at_every_expert(group: Any) -> None:
    shape = (3, 9, 6)
    config = MoEPlusPlusConfig(4, 5, **AUX, capacity_factor=0.8, capacity_group=group)
    module, x = chain(config, shape[2])[0], inputs(shape)
    side = side_of(shape).with_keys(torch.arange(shape[0]))
    result, valid = module(x, {}, side), side.valid_BT
    index = module.select(module.router(x), side).index_BTK
    late = without_room(config, index.tolist(), valid.tolist(), 0.8)
    out, _, loss, load = oracle(module, x, None, valid.tolist(), late)
    experts = [e for _, _, e in late]
    assert min(experts) < config.num_experts <= max(experts), "FFN experts and others have dropped some"
    assert result.stats["expert_dropped"].tolist() == [experts.count(e) for e in range(config.num_total)]
    assert torch.equal(result.stats["expert_load"], load)
    shown = valid[..., None]
    torch.testing.assert_close(result.out_BTD * shown, out * shown, rtol=1e-12, atol=1e-12)
    cotangent = inputs(shape, seed=2).detach() * shown
    leaves = [x, *module.parameters()]
    got = torch.autograd.grad((result.out_BTD * cotangent).sum() + result.losses["load_balance"], leaves)
    expected = torch.autograd.grad((out * cotangent).sum() + loss, leaves)
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("chosen", "expected"), [("copy", 1.0), ("zero", 0.0)])
def test_a_batch_without_ffn_picks(chosen: str, expected: float) -> None:
    config = MoEPlusPlusConfig(2, 3, num_constant=0, top_k=1)
    module, x = chain(config, 4)[0], torch.ones(1, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = module.router.get_parameter("weight")
    with torch.no_grad():
        weight.zero_()[{"copy": 2, "zero": 3}[chosen]] = 1.0
    out = module(x, {}, side_of((1, 3))).out_BTD
    torch.testing.assert_close(out, expected * x)
    gradients = torch.autograd.grad(out.sum(), [x, *module.experts.parameters(), weight])
    assert (gradients[0] == expected).all() and all((gradient == 0).all() for gradient in gradients[1:])


def test_a_zero_expert_that_takes_all_probability() -> None:
    """The other pick's probability is 0 in floating point; a share of nothing is nothing, not 0/0."""
    module, x = chain(MoEPlusPlusConfig(2, 3), 4)[0], torch.ones(1, 3, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        module.router.get_parameter("weight")[-1] = 1000.0
    out = module(x, {}, side_of((1, 3))).out_BTD
    gradients = torch.autograd.grad(out.sum(), [x, *module.router.parameters()])
    assert all((value == 0).all() for value in (out, *gradients))


def test_bfloat16_gives_bfloat16_and_float32_logits() -> None:
    shape, config = (2, 5, 8), MoEPlusPlusConfig(4, 8)
    module = chain(config, 8, torch.bfloat16)[0]
    result = module(inputs(shape).bfloat16(), {}, side_of(shape))
    assert result.out_BTD.dtype == torch.bfloat16 and result.writes[LOGITS].dtype == torch.float32


def test_released_gating_on_scaled_logits() -> None:
    config = MoEPlusPlusReleasedConfig(2, 3, gating="selected", logits_std=0.5)
    module, x, side = chain(config, 4)[0], inputs((1, 5, 4)), side_of((1, 5, 4))
    logits = module(x, {}, side).writes[LOGITS]
    torch.testing.assert_close(logits, module.router(x))
    routing = module.select(logits, side)
    assert torch.equal(routing.logits_BTE, logits), "what the next router adds to is not scaled"
    scaled = routing.probs_BTE.log()
    torch.testing.assert_close(scaled.std(-1), torch.full((1, 5), 0.5, dtype=torch.float64))
    top = scaled.sort(-1, descending=True).values[..., :2]
    torch.testing.assert_close(routing.weights_BTK, top.exp() / top.exp().sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 7}, "top_k is 7"),
        ({"hidden": 0}, "hidden is 0"),
        ({"num_copy": -1}, "num_copy is -1"),
        ({"tau": 0.0}, "tau is 0.0"),
    ],
)
def test_refusals(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEPlusPlusConfig(**{"num_experts": 2, "hidden": 8, **fields})
    with pytest.raises(ValueError, match="logits_std is 0"):
        MoEPlusPlusReleasedConfig(2, 8, logits_std=0.0)
