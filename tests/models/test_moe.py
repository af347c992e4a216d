"""The dropless mixture of experts against a loop over tokens, and what its balancing promises."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import LayerConfig, LMConfig
from models.ffn.dispatch import LocalDispatch
from models.ffn.experts import Experts
from models.ffn.moe import MoE, MoEConfig
from models.lm import LM
from models.mixers.attention import AttentionConfig
from models.params import Normal, initialize
from models.state import Result, Side
from tests.models.weights import randomize

LOSSES: dict[str, Any] = {"aux_coef": 0.3, "z_coef": 0.2}
SIZES = {
    "plain": ((2, 5, 6), MoEConfig(5, 2, 7, **LOSSES)),
    "gated shared expert": ((2, 3, 4), MoEConfig(4, 2, 5, shared_hidden=3, shared_gate=True, **LOSSES)),
    "shared expert": ((2, 3, 4), MoEConfig(4, 2, 5, shared_hidden=3, **LOSSES)),
    "one token": ((1, 1, 4), MoEConfig(3, 1, 3, normalize=False, **LOSSES)),
    "all experts": ((2, 3, 5), MoEConfig(3, 3, 4, scale=2.5, **LOSSES)),
    "empty experts": ((1, 4, 5), MoEConfig(16, 2, 3, **LOSSES)),
    "sigmoid": ((2, 4, 6), MoEConfig(5, 3, 7, score="sigmoid", scale=2.5, **LOSSES)),
    "sigmoid, not normalised": ((2, 4, 6), MoEConfig(5, 2, 7, score="sigmoid", normalize=False, **LOSSES)),
    "biased": ((2, 4, 6), MoEConfig(5, 2, 7, balance_rate=0.1, **LOSSES)),
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


def oracle(module: MoE, x_BTD: Tensor, valid: list[list[bool]]) -> tuple[Tensor, Tensor, Tensor]:
    """(output, sum of the losses, load), one token and one expert at a time, from the published equations."""
    config, experts = module.config, range(module.config.num_experts)
    weight = {name: parameter for name, parameter in module.named_parameters()}
    rows, tokens = range(x_BTD.shape[0]), range(x_BTD.shape[1])
    out, probs, picks, z = {}, {}, {}, x_BTD.new_zeros(())
    for b in rows:
        for t in tokens:
            x = x_BTD[b, t]
            logits = [(weight["router.weight"][e] * x).sum() for e in experts]
            exps = [torch.exp(value) for value in logits]
            scores = [value / sum(exps) for value in exps]
            if config.score == "sigmoid":
                scores = [1 / (1 + torch.exp(-value)) for value in logits]
            bias = module.balance_bias.tolist() if config.balance_rate else [0.0] * config.num_experts
            best = sorted(experts, key=lambda e: -(scores[e].item() + bias[e]))[: config.top_k]
            total = sum(scores[e] for e in best) if config.normalize else 1
            parts = [weight[f"experts.{name}"] for name in ("gate", "up", "down")]
            y = sum(scores[e] / total * config.scale * swiglu(x, *(part[e] for part in parts)) for e in best)
            if config.shared_hidden:
                shared = swiglu(x, *(weight[f"shared.{name}.weight"].T for name in ("gate", "up", "down")))
                if config.shared_gate:
                    shared = shared / (1 + torch.exp(-(weight["shared_gate.weight"][0] * x).sum()))
                y = y + shared
            out[b, t], probs[b, t], picks[b, t] = y, [s / sum(scores) for s in scores], best
            z = z + (torch.stack(exps).sum().log() ** 2 if valid[b][t] else 0)
    where = [(b, t) for b in rows for t in tokens if valid[b][t]]
    groups = [where] if config.stats_group == "microbatch" else [[at for at in where if at[0] == b] for b in rows]
    balance = x_BTD.new_zeros(())
    for group in filter(None, groups):
        for e in experts:
            f = sum(e in picks[at] for at in group) / len(group)
            mean = sum(probs[at][e] for at in group) / len(group)
            balance = balance + len(group) * config.num_experts * f * mean
    load = torch.tensor([sum(e in picks[at] for at in where) for e in experts])
    stacked = torch.stack([torch.stack([out[b, t] for t in tokens]) for b in rows])
    return stacked, config.aux_coef * balance + config.z_coef * z, load


@pytest.mark.parametrize("group", ["sequence", "microbatch"])
@pytest.mark.parametrize("case", SIZES)
def test_equals_a_loop_over_tokens(case: str, group: str) -> None:
    shape, config = SIZES[case]
    module, x, side = make(dataclasses.replace(config, stats_group=group), shape[2]), inputs(shape), side_of(shape, 1)
    if config.balance_rate:
        module.balance_bias.copy_(torch.tensor([0.3, 0.0, -0.2, 0.5, 0.1]))
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
    shape, config = SIZES["plain"]
    module, x, side = make(config, shape[2]), inputs(shape), side_of(shape, padded=2)
    changed = x.detach().clone()
    changed[0, -2:] = 9.0
    first, second = module(x, {}, side), module(changed, {}, side)
    for name, loss in first.losses.items():
        assert torch.equal(loss, second.losses[name])
    assert torch.equal(first.stats["expert_load"], second.stats["expert_load"])
    assert first.stats["expert_load"].sum() == config.top_k * side.valid_BT.sum()
    (gradient,) = torch.autograd.grad(loss_of(first), x)
    assert (gradient[0, -2:] == 0).all() and (gradient[0, :-2] != 0).any()


@pytest.mark.parametrize("group", ["sequence", "microbatch"])
def test_losses_of_parts_of_a_sequence_add_up(group: str) -> None:
    """What context and tensor ranks do: each has some tokens of every row, and only the counts are shared."""
    shape, config = SIZES["plain"]
    module, x, side = make(dataclasses.replace(config, stats_group=group), shape[2]), inputs(shape), side_of(shape, 1)
    whole = loss_of(module(x, {}, side))
    parts = [(x[:, :2], side.narrow(0, 2)), (x[:, 2:], side.narrow(2, 3))]
    counted: list[Tensor] = []
    module.reduce = lambda counts: counted.append(counts) or counts
    for part in parts:
        module(part[0], {}, part[1])
    module.reduce = lambda counts: counted[0] + counted[1]
    split = torch.stack([loss_of(module(part, {}, local)) for part, local in parts]).sum()
    torch.testing.assert_close(split, whole, rtol=1e-13, atol=0)
    got, expected = (torch.autograd.grad(loss, module.router.weight)[0] for loss in (split, whole))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_batch_without_valid_tokens_has_no_loss() -> None:
    shape, config = SIZES["plain"]
    ids = torch.zeros(shape[:2], dtype=torch.int64)
    result = make(config, shape[2])(inputs(shape), {}, Side(ids, ids, ids - 1))
    assert all(loss == 0 for loss in result.losses.values()) and not result.stats["expert_load"].any()


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_dispatch_keeps_the_order_of_rows(rows: int) -> None:
    experts = Experts(4, 6, 5, Normal(0.5))
    initialize(experts, seed=0)
    experts.double()
    x_MD, expert_M = inputs((rows, 6)), torch.tensor([3, 1, 3, 0, 1, 3, 3])[:rows]
    y_MD = LocalDispatch()(x_MD, expert_M, experts)
    assert y_MD.shape == (rows, 6)
    for row, e in enumerate(expert_M.tolist()):
        torch.testing.assert_close(y_MD[row], swiglu(x_MD[row], experts.gate[e], experts.up[e], experts.down[e]))
    gradients = torch.autograd.grad(y_MD.sum(), (x_MD, experts.gate))
    assert (gradients[1][2] == 0).all()


def test_bias_evens_out_loads_and_leaves_weights_alone() -> None:
    config = MoEConfig(4, 1, 3, normalize=False, aux_coef=0.0, balance_rate=0.01)
    module, x, side = make(config, 6), inputs((1, 64, 6)) + 0.5, side_of((1, 64))

    def step() -> Result:
        with torch.no_grad():
            return module(x, {}, side)

    before = step().stats["expert_load"]
    assert torch.equal(step().stats["expert_load"], before), "forward alone moves nothing"
    for _ in range(100):
        module.after_step(step().stats)
    after = step().stats["expert_load"]
    assert before.max() > 24 and after.max() < 20
    routing = module.select(module.router(x), module.balance_bias)
    torch.testing.assert_close(routing.weights_BTK, routing.logits_BTE.softmax(-1).gather(-1, routing.index_BTK))


def test_bias_moves_by_the_rate_towards_the_mean_load() -> None:
    module = make(MoEConfig(4, 2, 3, balance_rate=0.25), 6)
    module.after_step({"expert_load": torch.tensor([0, 2, 2, 4])})
    assert module.balance_bias.tolist() == [0.25, 0.0, 0.0, -0.25]


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float64])
def test_bias_stays_float32_when_the_model_is_cast(cast: torch.dtype) -> None:
    config = LMConfig(
        16, 8, {"M": LayerConfig(AttentionConfig(2), MoEConfig(4, 2, 8, balance_rate=1e-3))}, "M", tie_embeddings=True
    )
    model = LM(config)
    initialize(model, seed=0)
    name = "layers.0.ffn.branch.ffn.balance_bias"
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
    config = LMConfig(16, 8, {"M": LayerConfig(AttentionConfig(2), MoEConfig(4, 2, 8, balance_rate=1e-3))}, "M")
    with torch.device("meta"):
        model = LM(config)
    model.to_empty(device="cpu")
    model.get_buffer("layers.0.ffn.branch.ffn.balance_bias").fill_(torch.nan)
    initialize(model, seed=0)
    assert not model.get_buffer("layers.0.ffn.branch.ffn.balance_bias").any()


def test_the_model_adds_the_losses_of_its_layers() -> None:
    config = LMConfig(16, 8, {"M": LayerConfig(AttentionConfig(2), MoEConfig(4, 2, 8, **LOSSES))}, "MM")
    model = LM(config).double()
    initialize(model, seed=0)
    tokens = torch.arange(12).view(2, 6)
    out = model(tokens, tokens)
    assert out.losses.keys() == {"load_balance", "router_z"}
    torch.testing.assert_close(out.loss.detach(), out.token_loss + sum(out.losses.values()))
    assert out.stats.keys() == {f"layers.{layer}.ffn.expert_load" for layer in (0, 1)}


def test_router_works_in_float32_in_a_bfloat16_model() -> None:
    module = make(MoEConfig(4, 2, 8), 8, torch.bfloat16)
    result = module(inputs((1, 5, 8)).bfloat16(), {}, side_of((1, 5)))
    assert module.router(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.float32
    assert result.out_BTD.dtype == torch.bfloat16 and result.losses["load_balance"].dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 5}, "top_k is 5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 1}, "set normalize: false"),
        ({"hidden": 0}, "hidden is 0"),
        ({"shared_gate": True}, "shared_gate has no shared expert to act on"),
        ({"z_coef": -1.0}, "z_coef is -1.0"),
    ],
)
def test_refusals(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"num_experts": 4, "top_k": 2, "hidden": 8, **fields})
