"""The mixture of experts against a loop over tokens, router by router, and what its balancing promises."""

import dataclasses
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from models.config import LayerConfig, LMConfig
from models.ffn.dispatch import LocalDispatch
from models.ffn.experts import Experts
from models.ffn.groups import Peers
from models.ffn.moe import MoE, MoEConfig
from models.ffn.routing import Router, RouterConfig, TopKRouter
from models.lm import LM
from models.mixers.attention import AttentionConfig
from models.params import Normal, initialize
from models.routers.deepseek_v2 import DeepSeekV2, DeepSeekV2Config, LimitedRouter
from models.routers.deepseek_v3 import DeepSeekV3, DeepSeekV3Config
from models.routers.expert_choice import ExpertChoiceConfig
from models.routers.gshard import GShard, GShardConfig
from models.routers.mixtral import MixtralConfig
from models.routers.noisy_top_k import NoisyTopKConfig
from models.routers.switch import Switch, SwitchConfig
from models.state import Result, Side
from tests.models.weights import randomize

LOSSES: dict[str, Any] = {"aux_coef": 0.3, "z_coef": 0.2}
SIZES = {
    "mixtral": ((2, 5, 6), MoEConfig(5, 7, MixtralConfig(**LOSSES))),
    "gated shared expert": ((2, 3, 4), MoEConfig(4, 5, MixtralConfig(**LOSSES), 3, True)),
    "shared expert": ((2, 3, 4), MoEConfig(4, 5, MixtralConfig(**LOSSES), 3)),
    "one token": ((1, 1, 4), MoEConfig(3, 3, SwitchConfig(**LOSSES))),
    "all experts": ((2, 3, 5), MoEConfig(3, 4, MixtralConfig(top_k=3, **LOSSES))),
    "empty experts": ((1, 4, 5), MoEConfig(16, 3, MixtralConfig(**LOSSES))),
    "gshard": ((2, 5, 6), MoEConfig(5, 7, GShardConfig(**LOSSES))),
    "deepseek_v2": ((2, 4, 6), MoEConfig(5, 7, DeepSeekV2Config(top_k=2, scale=3.0, **LOSSES))),
    "groups by their best": (
        (2, 6, 6),
        MoEConfig(6, 7, DeepSeekV2Config(top_k=3, num_groups=3, top_groups=2, **LOSSES)),
    ),
    "deepseek_v3": ((2, 4, 6), MoEConfig(5, 7, DeepSeekV3Config(top_k=3, **LOSSES))),
    "groups by their two best": (
        (2, 6, 6),
        MoEConfig(6, 7, DeepSeekV3Config(top_k=2, num_groups=2, top_groups=1, **LOSSES)),
    ),
}


def make(config: MoEConfig, d_model: int, dtype: torch.dtype = torch.float64) -> MoE:
    model = LMConfig(2, d_model, {"M": LayerConfig(AttentionConfig(1, rope="none"), config)}, "M")
    module = config.build(model.context(0))
    assert isinstance(module, MoE)
    randomize(module, 0.7)
    return module.to(dtype)


def side_of(shape: tuple[int, ...], padded: int = 0) -> Side:
    """The last `padded` tokens of row 0 are padding."""
    ids = torch.zeros(shape[:2], dtype=torch.int64)
    documents = ids.clone()
    documents[0, shape[1] - padded :] = -1
    return Side(ids, ids, documents if padded else None)


def inputs(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def loss_of(result: Result) -> Tensor:
    return torch.stack(list(result.losses.values())).sum()


def swiglu(x_D: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    a = x_D @ gate
    return (a / (1 + torch.exp(-a)) * (x_D @ up)) @ down


def route(router: Router, logits: list[Tensor]) -> tuple[list[int], list[Tensor], list[Tensor], float]:
    """(picks, their weights, probabilities, factor of the balance loss) of one token, from the published equations."""
    experts = range(len(logits))
    exps = [torch.exp(value) for value in logits]
    probs = [value / sum(exps) for value in exps]
    scores, bias, strongest = probs, [0.0] * len(logits), 1
    if isinstance(router, DeepSeekV3):
        scores, bias, strongest = [1 / (1 + torch.exp(-value)) for value in logits], router.balance_bias.tolist(), 2
        probs = [score / sum(scores) for score in scores]
    allowed, factor, scale = set(experts), float(len(logits)), 1.0
    if isinstance(router, LimitedRouter):
        size, factor, scale = len(logits) // router.num_groups, len(logits) / router.top_k, router.scale
        groups = [range(size * g, size * (g + 1)) for g in range(router.num_groups)]
        best = [sum(sorted((scores[e].item() + bias[e] for e in group), reverse=True)[:strongest]) for group in groups]
        order = sorted(range(len(groups)), key=lambda g: -best[g])
        allowed = {e for g in order[: router.top_groups] for e in groups[g]}
    top_k = router.top_k if isinstance(router, TopKRouter) else 0
    picks = sorted(allowed, key=lambda e: -(scores[e].item() + bias[e]))[:top_k]
    total = 1 if isinstance(router, Switch | DeepSeekV2) else sum(scores[e] for e in picks)
    return picks, [scores[e] / total * scale for e in picks], probs, factor


def oracle(module: MoE, x_BTD: Tensor, valid: list[list[bool]]) -> tuple[Tensor, Tensor, Tensor]:
    """(output, sum of the losses, load), one token and one expert at a time."""
    config, experts = module.config, range(module.config.num_experts)
    weight = {name: parameter for name, parameter in module.named_parameters()}
    rows, tokens = range(x_BTD.shape[0]), range(x_BTD.shape[1])
    out, probs, picks, z, factor = {}, {}, {}, x_BTD.new_zeros(()), 1.0
    for b in rows:
        for t in tokens:
            x = x_BTD[b, t]
            logits = [(weight["router.weight"][e] * x).sum() for e in experts]
            picks[b, t], weights, probs[b, t], factor = route(module.router, logits)
            parts = [weight[f"experts.{name}"] for name in ("gate", "up", "down")]
            y = sum(w * swiglu(x, *(part[e] for part in parts)) for w, e in zip(weights, picks[b, t], strict=True))
            if config.shared_hidden:
                shared = swiglu(x, *(weight[f"shared.{name}.weight"].T for name in ("gate", "up", "down")))
                if config.shared_gate:
                    shared = shared / (1 + torch.exp(-(weight["shared_gate.weight"][0] * x).sum()))
                y = y + shared
            out[b, t] = y
            z = z + (torch.stack(logits).exp().sum().log() ** 2 if valid[b][t] else 0)
    counted = {at: p[:1] if isinstance(module.router, GShard) else p for at, p in picks.items()}
    where = [(b, t) for b in rows for t in tokens if valid[b][t]]
    whole = config.router.stats_group == "microbatch"
    balance = x_BTD.new_zeros(())
    for group in filter(None, [where] if whole else [[at for at in where if at[0] == b] for b in rows]):
        for e in experts:
            f = sum(e in counted[at] for at in group) / len(group)
            balance = balance + factor * f * sum(probs[at][e] for at in group)
    load = torch.tensor([sum(e in picks[at] for at in where) for e in experts])
    stacked = torch.stack([torch.stack([out[b, t] for t in tokens]) for b in rows])
    return stacked, 0.3 * balance + 0.2 * z, load


def in_group(config: MoEConfig, group: str) -> MoEConfig:
    return dataclasses.replace(config, router=dataclasses.replace(config.router, stats_group=group))


@pytest.mark.parametrize("group", ["sequence", "microbatch"])
@pytest.mark.parametrize("case", SIZES)
def test_equals_a_loop_over_tokens(case: str, group: str) -> None:
    shape, config = SIZES[case]
    module, x, side = make(in_group(config, group), shape[2]), inputs(shape), side_of(shape, 1)
    if isinstance(module.router, DeepSeekV3):
        module.router.balance_bias.copy_(torch.tensor([0.3, 0.0, -0.2, 0.5, 0.1, -0.1])[: config.num_experts])
    result = module(x, {}, side)
    out, loss, load = oracle(module, x, side.valid_BT.tolist())
    torch.testing.assert_close(result.out_BTD, out, rtol=1e-11, atol=1e-11)
    total = loss_of(result)
    torch.testing.assert_close(total, loss, rtol=1e-11, atol=1e-11)
    assert torch.equal(result.stats["expert_load"], load)
    leaves, cotangent = [x, *module.parameters()], inputs(shape, seed=2).detach()
    got = torch.autograd.grad((result.out_BTD * cotangent).sum() + total, leaves)
    expected = torch.autograd.grad((out * cotangent).sum() + loss, leaves)
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)


def test_padding_touches_neither_losses_nor_statistics() -> None:
    shape, config = SIZES["mixtral"]
    module, x, side = make(config, shape[2]), inputs(shape), side_of(shape, padded=2)
    changed = x.detach().clone()
    changed[0, -2:] = 9.0
    first, second = module(x, {}, side), module(changed, {}, side)
    for name, loss in first.losses.items():
        assert torch.equal(loss, second.losses[name])
    assert torch.equal(first.stats["expert_load"], second.stats["expert_load"])
    assert first.stats["expert_load"].sum() == 2 * side.valid_BT.sum()
    (gradient,) = torch.autograd.grad(loss_of(first), x)
    assert (gradient[0, -2:] == 0).all() and (gradient[0, :-2] != 0).any()


@pytest.mark.parametrize("group", ["sequence", "microbatch"])
def test_losses_of_parts_of_a_sequence_add_up(group: str) -> None:
    """What context and tensor ranks do: each has some tokens of every row, and only the counts are shared."""
    shape, config = SIZES["mixtral"]
    module, x, side = make(in_group(config, group), shape[2]), inputs(shape), side_of(shape, 1)
    whole = loss_of(module(x, {}, side))
    parts = [(x[:, :2], side.narrow(0, 2)), (x[:, 2:], side.narrow(2, 3))]
    counted: list[Tensor] = []
    module.router.balance.peers = peers = Mock(Peers)
    peers.sum = lambda counts: counted.append(counts) or counts
    for part in parts:
        module(part[0], {}, part[1])
    peers.sum = lambda counts: counted[0] + counted[1]
    split = torch.stack([loss_of(module(part, {}, local)) for part, local in parts]).sum()
    torch.testing.assert_close(split, whole, rtol=1e-13, atol=0)
    got, expected = (torch.autograd.grad(loss, module.router.weight)[0] for loss in (split, whole))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_batch_without_valid_tokens_has_no_loss() -> None:
    shape, config = SIZES["mixtral"]
    ids = torch.zeros(shape[:2], dtype=torch.int64)
    result = make(config, shape[2])(inputs(shape), {}, Side(ids, ids, ids - 1))
    assert all(loss == 0 for loss in result.losses.values()) and not result.stats["expert_load"].any()


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_dispatch_says_where_each_picks_output_is(rows: int) -> None:
    experts = Experts(4, 6, 5, Normal(0.5))
    initialize(experts, seed=0)
    experts.double()
    x_MD, expert_M = inputs((rows, 6)), torch.tensor([3, 1, 3, 0, 1, 3, 3])[:rows]
    keep_M = torch.tensor([True, True, False, True, True, False, True])[:rows]
    y_PD, places_M1 = LocalDispatch()(x_MD, expert_M[:, None], keep_M[:, None], experts)
    assert y_PD.shape == (int(keep_M.sum()), 6)
    for place, row, e in zip(places_M1.flatten().tolist(), range(rows), expert_M.tolist(), strict=True):
        assert (place >= 0) == keep_M[row]
        if place >= 0:
            torch.testing.assert_close(y_PD[place], swiglu(x_MD[row], experts.gate[e], experts.up[e], experts.down[e]))
    gradients = torch.autograd.grad(y_PD.sum(), (x_MD, experts.gate))
    assert (gradients[1][2] == 0).all()


def test_bias_evens_out_loads_and_leaves_weights_alone() -> None:
    config = MoEConfig(4, 3, DeepSeekV3Config(top_k=2, aux_coef=0.0, balance_rate=0.01))
    module, x, side = make(config, 6), inputs((1, 64, 6)) + 0.5, side_of((1, 64))

    def step() -> Result:
        with torch.no_grad():
            return module(x, {}, side)

    before = step().stats["expert_load"]
    assert torch.equal(step().stats["expert_load"], before), "forward alone moves nothing"
    for _ in range(100):
        module.after_step(step().stats)
    after = step().stats["expert_load"]
    assert before.max() > 44 and after.max() < 38, "of 32 on average"
    routing = module.router(x, side).routing
    scores = routing.logits_BTE.sigmoid().gather(-1, routing.index_BTK)
    torch.testing.assert_close(routing.weights_BTK, 2.5 * scores / scores.sum(-1, keepdim=True))


def test_bias_moves_by_the_rate_towards_the_mean_load() -> None:
    module = make(MoEConfig(4, 3, DeepSeekV3Config(top_k=2, balance_rate=0.25)), 6)
    module.after_step({"expert_load": torch.tensor([0, 2, 2, 4])})
    assert isinstance(module.router, DeepSeekV3)
    assert module.router.balance_bias.tolist() == [0.25, 0.0, 0.0, -0.25]


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float64])
def test_bias_stays_float32_when_the_model_is_cast(cast: torch.dtype) -> None:
    config = LMConfig(
        16,
        8,
        {"M": LayerConfig(AttentionConfig(2), MoEConfig(4, 8, DeepSeekV3Config(top_k=2)))},
        "M",
        tie_embeddings=True,
    )
    model = LM(config)
    initialize(model, seed=0)
    name = "layers.0.ffn.branch.ffn.router.balance_bias"
    model.get_buffer(name).fill_(1.0)
    model.to(cast)
    tokens = torch.arange(8)[None]
    out = model(tokens, tokens)
    out.loss.backward()
    model.after_step(dict(out.stats))
    bias = model.state_dict()[name]
    assert bias.dtype == torch.float32
    assert set(bias.sub(1).mul(1000).round().tolist()) <= {-1.0, 0.0, 1.0} and (bias != 1).any()


def test_a_model_built_on_meta_gets_its_buffers() -> None:
    config = LMConfig(16, 8, {"M": LayerConfig(AttentionConfig(2), MoEConfig(4, 8, DeepSeekV3Config(top_k=2)))}, "M")
    with torch.device("meta"):
        model = LM(config)
    model.to_empty(device="cpu")
    model.get_buffer("layers.0.ffn.branch.ffn.router.balance_bias").fill_(torch.nan)
    initialize(model, seed=0)
    assert not model.get_buffer("layers.0.ffn.branch.ffn.router.balance_bias").any()


def test_the_model_adds_the_losses_of_its_layers() -> None:
    config = LMConfig(16, 8, {"M": LayerConfig(AttentionConfig(2), MoEConfig(4, 8, MixtralConfig(**LOSSES)))}, "MM")
    model = LM(config).double()
    initialize(model, seed=0)
    tokens = torch.arange(12).view(2, 6)
    out = model(tokens, tokens)
    assert out.losses.keys() == {"load_balance", "router_z"}
    torch.testing.assert_close(out.loss.detach(), out.token_loss + sum(out.losses.values()))
    assert out.stats.keys() == {f"layers.{layer}.ffn.expert_load" for layer in (0, 1)}


def test_router_works_in_float32_in_a_bfloat16_model() -> None:
    module = make(MoEConfig(4, 8), 8, torch.bfloat16)
    x, side = inputs((1, 5, 8)).bfloat16(), side_of((1, 5))
    result = module(x, {}, side)
    assert module.router(x, side).routing.weights_BTK.dtype == torch.float32
    assert result.out_BTD.dtype == torch.bfloat16 and result.losses["load_balance"].dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": MixtralConfig(top_k=5)}, "top_k is 5; it must lie between 1 and num_experts, which is 4"),
        ({"hidden": 0}, "hidden is 0"),
        ({"shared_gate": True}, "shared_gate has no shared expert to act on"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
        ({"router": ExpertChoiceConfig(), "capacity_factor": 1.0}, "take a fixed number of tokens already"),
        ({"router": ExpertChoiceConfig(capacity_factor=5.0)}, "cannot get more than the 4 experts"),
        ({"router": NoisyTopKConfig(top_k=4)}, "top_k is 4 and there are 4 experts"),
        ({"router": GShardConfig(), "num_experts": 1}, "num_experts is 1, and router gshard picks 2"),
        ({"router": DeepSeekV2Config(top_k=2, num_groups=3)}, "does not divide the 4 experts"),
        ({"router": DeepSeekV2Config(top_k=3, num_groups=2)}, "among the 2 experts of top_groups 1"),
    ],
)
def test_refusals(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"num_experts": 4, "hidden": 8, **fields})


@pytest.mark.parametrize(
    ("router", "fields", "message"),
    [
        (MixtralConfig, {"top_k": 0}, "top_k is 0"),
        (MixtralConfig, {"top_k": 1}, "or a router for one pick, such as switch"),
        (MixtralConfig, {"z_coef": -1.0}, "z_coef is -1.0"),
        (SwitchConfig, {"jitter": 1.0}, "jitter is 1.0"),
        (DeepSeekV2Config, {"num_groups": 2, "top_groups": 3}, "top_groups is 3 of num_groups 2"),
        (DeepSeekV3Config, {"top_k": 1}, "or a router for one pick, such as switch"),
        (NoisyTopKConfig, {"top_k": 1}, "top_k is 1"),
    ],
)
def test_router_refusals(router: type[RouterConfig], fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router(**fields)
